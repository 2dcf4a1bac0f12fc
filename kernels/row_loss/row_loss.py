"""InfoNCE and NegNCE over one rank's rows of the global batch, computed tile by tile.

Every tile of scores is read three times:

    add_softmax_stats     softmax statistics and positives
    add_hard_negatives    the sums that NegNCE needs over its hard negatives
    gradient              d loss / d similarity, in the backward pass

A tile is needed only while it is read, so the caller may keep the scores or compute them again. The
state between passes is B numbers per row statistic and G numbers per column statistic. Both
directions use the same formulas, along rows or along columns.

With P the softmax of a row (or column) i, H_i its hard negatives, c_i the weight of its penalty and
U_i = sum over H_i of P / (1 - P), the gradient of -log P_ii + c_i sum over H_i of -log(1 - P) with
respect to a logit is

    P - [matched] - c_i U_i P + [hard] c_i P / (1 - P)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvr.kernels.row_loss.excluded_pairs import ExcludedPairs, compared_ids
from tvr.kernels.row_loss.online_softmax import (
    Collectives,
    OnlineSoftmax,
    TilePosition,
    exceeds_positive,
    gather_positives,
)

MIN_PROBABILITY = 1e-6  # clamp of P and of 1 - P in `reference` mode
DOMINANT = 0.75  # above one half, so that at most one entry of a softmax is dominant


@dataclass(frozen=True)
class LossRule:
    """Settings of the loss over the similarities of the global batch; see `losses`.

    Raises:
        ValueError: unknown mode.
    """

    neg_nce_mode: str | None
    """None selects InfoNCE; "reference" and "log" are the modes of NegNCE."""
    scale: float = 100.0
    """1 / temperature."""
    weight: float = 0.5
    """Weight of the NegNCE penalty."""
    mask_same_video: bool | None = None
    """True excludes pairs of equal video id; None does so in `log` mode if ids are given."""
    mask_equal_captions: bool | None = None
    """The same for pairs of equal caption id."""

    def __post_init__(self) -> None:
        if self.neg_nce_mode not in (None, "reference", "log"):
            raise ValueError(
                f"mode={self.neg_nce_mode!r} of NegNCE is unknown; use 'reference' or 'log'"
            )

    def excluded_pairs(
        self, num_pairs: int, video_ids: Tensor | None, caption_ids: Tensor | None
    ) -> ExcludedPairs:
        """Pairs that are no negatives; the ids are those of all G pairs. Raises ValueError."""
        masks = (
            ("video_ids", video_ids, "mask_same_video"),
            ("caption_ids", caption_ids, "mask_equal_captions"),
        )
        mode = self.neg_nce_mode or ""
        return ExcludedPairs(
            *(
                compared_ids(
                    name, ids, num_pairs, mask=getattr(self, setting), setting=setting, mode=mode
                )
                for name, ids, setting in masks
            )
        )


class _Direction:
    """Statistics of one direction: one number per row (dim 1) or per column (dim 0)."""

    def __init__(self, dim: int, size: int, like: Tensor) -> None:
        self.dim = dim
        self.softmax = OnlineSoftmax.empty(size, like)
        self.total = self.softmax.total
        # Sums over the hard negatives of a row: their number, -log(1 - P), P / (1 - P) of those
        # that are not dominant, and the number of dominant ones (0 or 1).
        self.num_hard, self.penalty, self.odds, self.num_dominant = like.new_zeros(4, size)
        self.penalty_weight = like.new_zeros(size)
        self.unclamped = like.new_ones(size)  # 0 where the clamp removes the positive's gradient

    def broadcast(self, statistic: Tensor, position: TilePosition, tile: Tensor) -> Tensor:
        """View of a statistic's entries for the rows (or columns) of a tile, broadcast over it."""
        if self.dim == 1:
            first, size = position.row, tile.shape[0]
        else:
            first, size = position.column, tile.shape[1]
        return statistic[first : first + size].unsqueeze(self.dim)

    def add_sums(self, statistic: Tensor, position: TilePosition, tile: Tensor) -> None:
        """Adds the tile's sums along this direction to a statistic."""
        self.broadcast(statistic, position, tile).add_(tile.sum(self.dim, keepdim=True))


class RowLoss:
    """Loss of one rank's B rows of the (G, G) similarities, from tiles of scores.

    Call `add_softmax_stats` with every tile, then `finish_softmax`; then `add_hard_negatives` with
    every tile, then `finish_hard_negatives`. `shares`, `statistics` and `gradient` follow. The two
    `finish_` calls are collective: every rank must make them.

    Args:
        rule: Loss and its settings.
        num_rows: B.
        num_pairs: G.
        row_offset: Row 0 of this rank is row `row_offset` of the square.
        collectives: Reductions over ranks.
        video_ids: Ids of all G pairs; needed where pairs of one video are excluded.
        caption_ids: The same for pairs of one caption.
        like: Tensor whose dtype and device the statistics take.

    Raises:
        ValueError: rows outside the square, masking without ids, or ids of another length.
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
        caption_ids: Int[Tensor, " G"] | None = None,
        like: Tensor,
    ) -> None:
        _check(num_rows, num_pairs, row_offset)
        self.rule, self.collectives = rule, collectives
        self.num_pairs, self.row_offset = num_pairs, row_offset
        self.excluded = rule.excluded_pairs(num_pairs, video_ids, caption_ids)
        self.rows, self.columns = _Direction(1, num_rows, like), _Direction(0, num_pairs, like)
        # The rows and the columns of this rank's own pairs.
        self.own_pairs = (slice(None), slice(row_offset, row_offset + num_rows))
        self.positives = like.new_zeros(num_rows)
        self.all_positives = like.new_zeros(num_pairs)
        self.hardest = like.new_full((num_rows,), -torch.inf)  # largest negative logit of a row

    @property
    def directions(self) -> tuple[_Direction, _Direction]:
        """Text-to-video, then video-to-text."""
        return self.rows, self.columns

    def add_softmax_stats(self, scores: Float[Tensor, "n m"], position: TilePosition) -> None:
        """First pass: adds a tile's softmax statistics and positives. Tiles come in any order."""
        positives, first = position.diagonal(scores)
        first += position.row
        self.positives[first : first + len(positives)] = positives
        logits, _ = self._logits(scores, position)
        self.rows.softmax.add_tile(position.row, OnlineSoftmax.of_tile(logits, 1))
        self.columns.softmax.add_tile(position.column, OnlineSoftmax.of_tile(logits, 0))
        position.diagonal(logits)[0].fill_(-torch.inf)
        hardest = self.rows.broadcast(self.hardest, position, logits).squeeze(1)
        torch.maximum(hardest, logits.amax(1), out=hardest)

    def finish_softmax(self) -> None:
        """Ends the first pass: merges column statistics over ranks and gathers all positives."""
        self.columns.softmax = self.columns.softmax.all_reduce(self.collectives)
        self.all_positives = gather_positives(
            self.positives, self.row_offset, self.num_pairs, self.collectives
        )
        positives_of = (self.positives, self.all_positives)
        for direction, positives in zip(self.directions, positives_of, strict=True):
            direction.total = direction.softmax.total
            if self.rule.neg_nce_mode == "reference":
                probability = (self.rule.scale * positives - direction.total).exp()
                direction.unclamped = _within_clamp(probability).to(positives.dtype)

    def add_hard_negatives(self, scores: Float[Tensor, "n m"], position: TilePosition) -> None:
        """Second pass: adds a tile's sums over hard negatives. Tiles come in any order."""
        if self.rule.neg_nce_mode is None:
            # InfoNCE only reports their number.
            hard = self._hard(scores, self.excluded.of_tile(position, scores), position)
            return self.rows.add_sums(self.rows.num_hard, position, hard.to(scores.dtype))
        logits, excluded = self._logits(scores, position)
        hard = self._hard(scores, excluded, position)
        for direction in self.directions:
            direction.add_sums(direction.num_hard, position, hard.to(scores.dtype))
            probability = (logits - direction.broadcast(direction.total, position, scores)).exp_()
            moderate, dominant = self._split_hard(probability, hard)
            direction.add_sums(direction.odds, position, _odds(probability, moderate))
            if dominant is None:
                clamped = probability.clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY)
                penalty = -torch.log1p(-clamped)
                penalty = penalty.masked_fill_(~hard, 0)
            else:
                lead = direction.total - direction.softmax.rest
                penalty = -torch.log1p(-probability.masked_fill(~moderate, 0))
                lead = direction.broadcast(lead, position, scores)
                penalty = torch.where(dominant, lead, penalty)
                direction.add_sums(direction.num_dominant, position, dominant.to(scores.dtype))
            direction.add_sums(direction.penalty, position, penalty)

    def finish_hard_negatives(self) -> None:
        """Ends the second pass: sums column statistics over ranks and sets the penalty weights."""
        columns = self.columns
        if self.rule.neg_nce_mode is None:
            return
        columns.num_hard, columns.odds, columns.num_dominant = self.collectives.sum(
            torch.stack([columns.num_hard, columns.odds, columns.num_dominant])
        )
        for direction in self.directions:
            divisor = direction.num_hard.clamp_min(1) * self.num_pairs
            if self.rule.neg_nce_mode == "reference":
                # One mean over all hard negatives of the global batch.
                divisor = columns.num_hard.sum().clamp_min(1).expand_as(divisor)
            direction.penalty_weight = self.rule.weight / divisor

    def gradient(
        self,
        scores: Float[Tensor, "n m"],
        position: TilePosition,
        text_to_video: Tensor,
        video_to_text: Tensor,
    ) -> Float[Tensor, "n m"]:
        """Gradient of the loss, summed over ranks, with respect to a tile of similarities.

        `text_to_video` and `video_to_text` are the incoming gradients of the two shares.
        """
        logits, excluded = self._logits(scores, position)
        is_info_nce = self.rule.neg_nce_mode is None
        hard = None if is_info_nce else self._hard(scores, excluded, position)
        result = torch.zeros_like(scores)
        for direction, factor in zip(self.directions, (text_to_video, video_to_text), strict=True):
            result += factor * self._logit_gradient(logits, hard, direction, position)
        return result.mul_(self.rule.scale)

    def shares(self) -> tuple[Tensor, Tensor]:
        """This rank's shares of the text-to-video and of the video-to-text loss."""
        values = []
        for direction, own in zip(self.directions, self.own_pairs, strict=True):
            log_probability = self.rule.scale * self.positives - direction.total[own]
            if self.rule.neg_nce_mode == "reference":
                probability = log_probability.exp()
                log_probability = probability.clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY).log()
            penalty = (direction.penalty_weight * direction.penalty).sum()
            values.append(penalty - log_probability.sum() / self.num_pairs)
        return values[0], values[1]

    def statistics(self) -> tuple[Tensor, ...]:
        """This rank's shares of the statistics of `LossTerms`, from `penalty` on.

        A row without negatives counts as `hardest_similarity` 0.
        """
        penalty, clamped = self.positives.new_zeros(2)
        for direction, own in zip(self.directions, self.own_pairs, strict=True):
            penalty = penalty + (direction.penalty_weight * direction.penalty).sum() / 2
            if self.rule.neg_nce_mode == "reference":
                log_probability = self.rule.scale * self.positives - direction.total[own]
                clamped = clamped + (log_probability.exp() < MIN_PROBABILITY).sum() / 2
        hardest = self.hardest.masked_fill(self.hardest == -torch.inf, 0) / self.rule.scale
        alike = self.excluded.by_caption_alone(self.own_pairs[1])
        alike = torch.zeros_like(clamped) if alike is None else alike.to(clamped)
        row_sums = (self.rows.num_hard, clamped, self.positives, hardest, alike)
        return penalty, *(x.sum() / self.num_pairs for x in row_sums)

    def _logits(
        self, scores: Tensor, position: TilePosition
    ) -> tuple[Tensor, Bool[Tensor, "n m"] | None]:
        """Scaled scores, and the mask of excluded pairs, whose logit is -inf."""
        logits = self.rule.scale * scores
        excluded = self.excluded.of_tile(position, scores)
        return logits if excluded is None else logits.masked_fill_(excluded, -torch.inf), excluded

    def _hard(self, scores: Tensor, excluded: Tensor | None, position: TilePosition) -> Tensor:
        row_positives = self.rows.broadcast(self.positives, position, scores).squeeze(1)
        column_positives = self.columns.broadcast(self.all_positives, position, scores).squeeze(0)
        hard = exceeds_positive(scores, position, row_positives, column_positives)
        return hard if excluded is None else hard & ~excluded

    def _split_hard(self, probability: Tensor, hard: Tensor) -> tuple[Tensor, Tensor | None]:
        """Splits hard negatives by the formula of their gradient.

        The first mask holds those whose gradient uses P / (1 - P). In `log` mode the second mask
        holds the dominant ones, where 1 - P rounds to 0: there 1 - P is computed from
        `OnlineSoftmax.rest`. A dominant entry is off the diagonal, so the rest is never empty.
        """
        if self.rule.neg_nce_mode == "reference":
            return hard & _within_clamp(probability), None
        dominant = hard & (probability > DOMINANT)
        return hard & ~dominant, dominant

    def _logit_gradient(
        self, logits: Tensor, hard: Tensor | None, direction: _Direction, position: TilePosition
    ) -> Tensor:
        """Gradient of one direction's loss with respect to a tile of logits."""
        probability = (logits - direction.broadcast(direction.total, position, logits)).exp_()
        positive_weight = direction.unclamped / self.num_pairs
        factor = positive_weight - direction.penalty_weight * direction.odds
        result = probability * direction.broadcast(factor, position, logits)
        matched, first = position.diagonal(result)
        first += position.row + (0 if direction.dim == 1 else self.row_offset)
        matched -= positive_weight[first : first + len(matched)]
        if hard is None:
            return result
        moderate, dominant = self._split_hard(probability, hard)
        penalty_weight = direction.broadcast(direction.penalty_weight, position, logits)
        result += penalty_weight * _odds(probability, moderate)
        if dominant is not None:
            result += self._dominant_gradient(logits, dominant, direction, position)
        return result

    def _dominant_gradient(
        self, logits: Tensor, dominant: Tensor, direction: _Direction, position: TilePosition
    ) -> Tensor:
        """Gradient of penalty_weight x (total - rest) in rows with a dominant entry; else 0."""
        has_dominant = direction.num_dominant > 0
        top_probability = (direction.softmax.top - direction.total).exp()
        push = direction.penalty_weight * top_probability * has_dominant
        # Without a dominant entry, rest = inf makes the share exp(l - inf) = 0.
        rest = direction.softmax.rest.masked_fill(~has_dominant, torch.inf)
        share_of_rest = (logits - direction.broadcast(rest, position, logits)).exp_()
        push = direction.broadcast(push, position, logits)
        return torch.where(dominant, push, -push * share_of_rest)


def _within_clamp(probability: Tensor) -> Tensor:
    return (probability >= MIN_PROBABILITY) & (probability <= 1 - MIN_PROBABILITY)


def _odds(probability: Tensor, selected: Tensor) -> Tensor:
    """P / (1 - P) of the selected entries, 0 elsewhere."""
    probability = probability.masked_fill(~selected, 0)
    return probability / (1 - probability)


def _check(num_rows: int, num_pairs: int, row_offset: int) -> None:
    if not 0 <= row_offset <= num_pairs - num_rows:
        raise ValueError(
            f"row_offset={row_offset} with {num_rows} rows exceeds the {num_pairs} pairs; "
            f"allowed are 0 to {num_pairs - num_rows}"
        )
