"""The formulas of InfoNCE and NegNCE on tiles of one rank's rows, in three passes.

    look      softmax statistics and the matched pairs
    meet      hard negatives, and what NegNCE adds up over them
    gradient  d loss / d similarity of a tile, in the backward

A tile is needed only while it is looked at, so that its scores may be kept or computed again; what
stays are lines: B for the rows, G for the columns. Both directions are the same formulas with rows
and columns swapped. With P the softmax along a line, c a line's weight and U = sum P / (1 - P) over
its hard negatives, d / d logit of -log P_ii + c sum_H -log(1 - P) is

    P - [matched] - c U P + [hard] c P / (1 - P)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvr.kernels.row_loss.online_softmax import (
    Collectives,
    Place,
    Softmax,
    above_positive,
    everyones_positives,
)

SMALLEST = 1e-6  # the reference's clamp of a probability, and of 1 minus it
DOMINANT = 0.75  # at most one entry of a softmax exceeds this, whatever the rounding


@dataclass(frozen=True)
class LossRule:
    """What is minimised over the similarities of the global batch: `losses` describes it.

    `neg_nce_mode` None is InfoNCE; `scale` is 1 / temperature; `weight` is the penalty's;
    `mask_same_video` None is on in `log` mode where video ids are given.

    Raises:
        ValueError: unknown mode.
    """

    neg_nce_mode: str | None
    scale: float = 100.0
    weight: float = 0.5
    mask_same_video: bool | None = None

    def __post_init__(self) -> None:
        if self.neg_nce_mode not in (None, "reference", "log"):
            raise ValueError(
                f"mode={self.neg_nce_mode!r} of NegNCE is unknown; use 'reference' or 'log'"
            )

    def masks(self, video_ids: Tensor | None) -> bool:
        """Whether pairs of equal video id are left out."""
        if self.mask_same_video is None:
            return self.neg_nce_mode == "log" and video_ids is not None
        return self.mask_same_video


class _Lines:
    """The lines of one direction; `dim` is the dimension of a tile along which a line runs."""

    def __init__(self, dim: int, num_lines: int, like: Tensor) -> None:
        self.dim = dim
        self.softmax = Softmax.empty(num_lines, like)
        self.total = self.softmax.total
        # Over the hard negatives of a line: their number, the sum of -log(1 - P), that of
        # P / (1 - P) without one that dominates the line, and whether there is such a one.
        self.count, self.penalty, self.slope, self.dominated = like.new_zeros(4, num_lines)
        self.weight = like.new_zeros(num_lines)
        self.active = like.new_ones(num_lines)  # 0 where the clamp silences the positive

    def over(self, line: Tensor, place: Place, tile: Tensor) -> Tensor:
        """The entries of the tile's lines, as a view that spreads over the tile."""
        first, size = (place.row, tile.shape[0]) if self.dim == 1 else (place.column, tile.shape[1])
        return line[first : first + size].unsqueeze(self.dim)

    def add(self, line: Tensor, place: Place, tile: Tensor) -> None:
        """line += sums of the tile along its lines."""
        self.over(line, place, tile).add_(tile.sum(self.dim, keepdim=True))


class RowLoss:
    """The loss of one rank's B rows of the global batch's G pairs; see the module for the passes.

    Raises:
        ValueError: rows outside the square, a mask without ids, or ids of another length.
    """

    def __init__(
        self,
        rule: LossRule,
        *,
        num_rows: int,
        num_pairs: int,
        row_offset: int,
        collectives: Collectives,
        video_ids: Int[Tensor, " G"] | None,
        like: Tensor,
    ) -> None:
        _check(num_rows, num_pairs, row_offset, rule, video_ids)
        self.rule, self.collectives = rule, collectives
        self.num_pairs, self.row_offset = num_pairs, row_offset
        self.video_ids = video_ids if rule.masks(video_ids) else None
        self.rows, self.columns = _Lines(1, num_rows, like), _Lines(0, num_pairs, like)
        # Of each direction the lines that belong to this rank's pairs.
        self.own = (slice(None), slice(row_offset, row_offset + num_rows))
        self.positives = like.new_zeros(num_rows)
        self.hardest = like.new_full((num_rows,), -torch.inf)  # logits of negatives
        self.everyones = like.new_zeros(num_pairs)

    @property
    def lines(self) -> tuple[_Lines, _Lines]:
        return self.rows, self.columns

    def look(self, scores: Float[Tensor, "n m"], place: Place) -> None:
        """First pass: every tile once, in any order."""
        found, first = place.diagonal(scores)
        self.positives[place.row + first : place.row + first + len(found)] = found
        logits, _ = self._logits(scores, place)
        self.rows.softmax.add(place.row, Softmax.of(logits, 1))
        self.columns.softmax.add(place.column, Softmax.of(logits, 0))
        place.diagonal(logits)[0].fill_(-torch.inf)
        hardest = self.rows.over(self.hardest, place, logits).squeeze(1)
        torch.maximum(hardest, logits.amax(1), out=hardest)

    def looked(self) -> None:
        """Ends the first pass: the columns are joined over ranks."""
        self.columns.softmax = self.columns.softmax.over_ranks(self.collectives)
        self.everyones = everyones_positives(
            self.positives, self.row_offset, self.num_pairs, self.collectives
        )
        for lines, positives in zip(self.lines, (self.positives, self.everyones), strict=True):
            lines.total = lines.softmax.total
            if self.rule.neg_nce_mode == "reference":
                probability = (self.rule.scale * positives - lines.total).exp()
                lines.active = _in_range(probability).to(positives.dtype)

    def meet(self, scores: Float[Tensor, "n m"], place: Place) -> None:
        """Second pass: every tile once more."""
        logits, excluded = self._logits(scores, place)
        hard = self._hard(scores, excluded, place)
        for lines in self.lines:
            lines.add(lines.count, place, hard.to(scores.dtype))
            if self.rule.neg_nce_mode is None:
                continue
            probability = (logits - lines.over(lines.total, place, scores)).exp_()
            gentle, dominant = self._by_slope(probability, hard)
            lines.add(lines.slope, place, _odds(probability, gentle))
            if dominant is None:
                penalty = -torch.log1p(-probability.clamp(SMALLEST, 1 - SMALLEST))
                penalty = penalty.masked_fill_(~hard, 0)
            else:
                lead = lines.total - lines.softmax.rest
                penalty = -torch.log1p(-probability.masked_fill(~gentle, 0))
                penalty = torch.where(dominant, lines.over(lead, place, scores), penalty)
                lines.add(lines.dominated, place, dominant.to(scores.dtype))
            lines.add(lines.penalty, place, penalty)

    def met(self) -> None:
        """Ends the second pass: the columns' counts and slopes are joined over ranks."""
        columns = self.columns
        if self.rule.neg_nce_mode is None:
            return
        columns.count, columns.slope, columns.dominated = self.collectives.sum(
            torch.stack([columns.count, columns.slope, columns.dominated])
        )
        for lines in self.lines:
            over = lines.count.clamp_min(1) * self.num_pairs
            if self.rule.neg_nce_mode == "reference":
                over = columns.count.sum().clamp_min(1).expand_as(over)
            lines.weight = self.rule.weight / over

    def gradient(
        self,
        scores: Float[Tensor, "n m"],
        place: Place,
        text_to_video: Tensor,
        video_to_text: Tensor,
    ) -> Float[Tensor, "n m"]:
        """d (the factors x the two directions, summed over ranks) / d similarity of a tile."""
        logits, excluded = self._logits(scores, place)
        hard = self._hard(scores, excluded, place)
        result = torch.zeros_like(scores)
        for lines, factor in zip(self.lines, (text_to_video, video_to_text), strict=True):
            result += factor * self._of_logits(logits, hard, lines, place)
        return result.mul_(self.rule.scale)

    def shares(self) -> tuple[Tensor, Tensor]:
        """This rank's shares of the text-to-video and of the video-to-text loss."""
        values = []
        for lines, own in zip(self.lines, self.own, strict=True):
            log_probability = self.rule.scale * self.positives - lines.total[own]
            if self.rule.neg_nce_mode == "reference":
                log_probability = log_probability.exp().clamp(SMALLEST, 1 - SMALLEST).log()
            penalty = (lines.weight * lines.penalty).sum()
            values.append(penalty - log_probability.sum() / self.num_pairs)
        return values[0], values[1]

    def statistics(self) -> tuple[Tensor, ...]:
        """This rank's shares of the penalty, of hard negatives per row, of silenced positives, and
        of the similarity of positives and of each row's hardest negative (0 in a row without)."""
        penalty, silent = self.positives.new_zeros(2)
        for lines, own in zip(self.lines, self.own, strict=True):
            penalty = penalty + (lines.weight * lines.penalty).sum() / 2
            if self.rule.neg_nce_mode == "reference":
                log_probability = self.rule.scale * self.positives - lines.total[own]
                silent = silent + (log_probability.exp() < SMALLEST).sum() / 2
        hardest = self.hardest.masked_fill(self.hardest == -torch.inf, 0) / self.rule.scale
        over_rows = (self.rows.count, silent, self.positives, hardest)
        return penalty, *(x.sum() / self.num_pairs for x in over_rows)

    def _logits(self, scores: Tensor, place: Place) -> tuple[Tensor, Bool[Tensor, "n m"] | None]:
        """Scaled scores, and which pairs are left out (their logit is -inf)."""
        logits = self.rule.scale * scores
        if self.video_ids is None:
            return logits, None
        first_row = self.row_offset + place.row
        of_rows = self.video_ids[first_row : first_row + scores.shape[0]]
        of_columns = self.video_ids[place.column : place.column + scores.shape[1]]
        excluded = of_rows[:, None] == of_columns
        place.diagonal(excluded)[0].fill_(False)
        return logits.masked_fill_(excluded, -torch.inf), excluded

    def _hard(self, scores: Tensor, excluded: Tensor | None, place: Place) -> Tensor:
        of_rows = self.rows.over(self.positives, place, scores).squeeze(1)
        of_columns = self.columns.over(self.everyones, place, scores).squeeze(0)
        hard = above_positive(scores, place, of_rows, of_columns)
        return hard if excluded is None else hard & ~excluded

    def _by_slope(self, probability: Tensor, hard: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hard negatives whose slope is P / (1 - P), and in log mode those that dominate a line.

        Near P = 1 that would be 1 / 0; there 1 - P is the sum of the OTHER entries over the total,
        which `Softmax.rest` holds. A dominant one is off the diagonal, so the others are not empty.
        """
        if self.rule.neg_nce_mode == "reference":
            return hard & _in_range(probability), None
        dominant = hard & (probability > DOMINANT)
        return hard & ~dominant, dominant

    def _of_logits(self, logits: Tensor, hard: Tensor, lines: _Lines, place: Place) -> Tensor:
        """d loss / d logits of one direction."""
        probability = (logits - lines.over(lines.total, place, logits)).exp_()
        positive = lines.active / self.num_pairs
        result = probability * lines.over(positive - lines.weight * lines.slope, place, logits)
        matched, first = place.diagonal(result)
        first += place.row + (0 if lines.dim == 1 else self.row_offset)
        matched -= positive[first : first + len(matched)]
        if self.rule.neg_nce_mode is None:
            return result
        gentle, dominant = self._by_slope(probability, hard)
        result += lines.over(lines.weight, place, logits) * _odds(probability, gentle)
        if dominant is not None:
            result += self._of_dominant(logits, dominant, lines, place)
        return result

    def _of_dominant(self, logits: Tensor, dominant: Tensor, lines: _Lines, place: Place) -> Tensor:
        """Of c x (total - rest) in the lines that one entry dominates; 0 in the others."""
        is_dominated = lines.dominated > 0
        push = lines.weight * (lines.softmax.top - lines.total).exp() * is_dominated
        # Without a dominant entry: exp(l - inf) = 0, whatever the rest.
        rest = lines.softmax.rest.masked_fill(~is_dominated, torch.inf)
        share_of_rest = (logits - lines.over(rest, place, logits)).exp_()
        push = lines.over(push, place, logits)
        return torch.where(dominant, push, -push * share_of_rest)


def _in_range(probability: Tensor) -> Tensor:
    return (probability >= SMALLEST) & (probability <= 1 - SMALLEST)


def _odds(probability: Tensor, where: Tensor) -> Tensor:
    """P / (1 - P) there, 0 elsewhere."""
    kept = probability.masked_fill(~where, 0)
    return kept / (1 - kept)


def _check(
    num_rows: int, num_pairs: int, row_offset: int, rule: LossRule, video_ids: Tensor | None
) -> None:
    if not 0 <= row_offset <= num_pairs - num_rows:
        raise ValueError(
            f"row_offset={row_offset} with {num_rows} rows leaves the {num_pairs} pairs; "
            f"allowed are 0 to {num_pairs - num_rows}"
        )
    if rule.masks(video_ids) and video_ids is None:
        raise ValueError("mask_same_video=True needs video_ids of all G pairs, but None was passed")
    if video_ids is not None and video_ids.shape != (num_pairs,):
        raise ValueError(
            f"video_ids has shape {tuple(video_ids.shape)} but must hold the ids of all "
            f"{num_pairs} pairs of the global batch"
        )
