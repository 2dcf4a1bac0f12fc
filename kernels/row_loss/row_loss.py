"""A loss over one rank's rows of the global batch, computed tile by tile.

Every tile of scores is read three times:

    add_softmax_stats     positives and the sums over all negatives
    add_hard_negatives    the sums over hard negatives
    gradient              d loss / d similarity, in the backward pass

A tile is needed only while it is read, so the caller may keep the scores or compute them again. The
state between passes is B numbers per row statistic and G numbers per column statistic. Both
directions use the same formulas, along rows or along columns; `direction.DirectionLoss` is one of
them, and each form of the loss is a class of its own.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvr.kernels.row_loss.direction import DirectionLoss, DirectionShape
from tvr.kernels.row_loss.info_nce import InfoNceDirection
from tvr.kernels.row_loss.loss_rule import LossRule
from tvr.kernels.row_loss.neg_nce_pairs import LogNegNceDirection, ReferenceNegNceDirection
from tvr.kernels.row_loss.neg_nce_set import SetNegNceDirection
from tvr.kernels.row_loss.online_softmax import (
    Collectives,
    TilePosition,
    exceeds_positive,
    gather_positives,
)
from tvr.kernels.row_loss.sigmoid import SigmoidDirection

__all__ = ["LossRule", "RowLoss"]

FORMS: dict[str | None, type[DirectionLoss]] = {
    None: InfoNceDirection,
    "reference": ReferenceNegNceDirection,
    "log": LogNegNceDirection,
    "set": SetNegNceDirection,
}


class RowLoss:
    """Loss of one rank's B rows of the (G, G) similarities, from tiles of scores.

    Call `add_softmax_stats` with every tile, then `finish_softmax`; then `add_hard_negatives` with
    every tile, then `finish_hard_negatives`. `shares`, `statistics` and `gradient` follow. If
    `needs_positives`, call `add_positives` with every tile that holds matched pairs, and
    `finish_positives`, before all others. The `finish_` calls are collective: every rank must make
    them.

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
        self.own_columns = slice(row_offset, row_offset + num_rows)
        form = SigmoidDirection if rule.sigmoid else FORMS[rule.neg_nce_mode]
        rows, columns = (
            form(rule, DirectionShape(dim, size, num_pairs, row_offset, own), like)
            for dim, size, own in (
                (1, num_rows, slice(None)),
                (0, num_pairs, self.own_columns),
            )
        )
        self.directions = rows, columns
        """Text-to-video, then video-to-text."""
        self.positives = like.new_zeros(num_rows)
        self.all_positives = like.new_zeros(num_pairs)
        self.hardest = like.new_full((num_rows,), -torch.inf)  # largest negative logit of a row
        self.num_dropped = like.new_zeros(num_rows)

    @property
    def needs_positives(self) -> bool:
        """Whether the positives must be known before `add_softmax_stats`."""
        return self.rule.drop_above is not None

    def add_positives(self, scores: Float[Tensor, "n m"], position: TilePosition) -> None:
        """Takes the positives of a tile. Tiles come in any order."""
        positives, first = position.diagonal(scores)
        first += position.row
        self.positives[first : first + len(positives)] = positives

    def finish_positives(self) -> None:
        """Gathers the positives of all ranks."""
        self.all_positives = gather_positives(
            self.positives, self.row_offset, self.num_pairs, self.collectives
        )

    def add_softmax_stats(self, scores: Float[Tensor, "n m"], position: TilePosition) -> None:
        """First pass: adds a tile's negatives and its positives. Tiles come in any order."""
        if not self.needs_positives:
            self.add_positives(scores, position)
        logits, excluded = self._logits(scores, position)
        position.diagonal(logits)[0].fill_(-torch.inf)
        for direction in self.directions:
            dropped = self._dropped(scores, excluded, direction, position)
            kept = logits if dropped is None else logits.masked_fill(dropped, -torch.inf)
            direction.add_negatives(kept, position)
            if direction.shape.dim == 1:
                hardest = direction.broadcast(self.hardest, position, kept).squeeze(1)
                torch.maximum(hardest, kept.amax(1), out=hardest)
                if dropped is not None:
                    direction.add_sums(self.num_dropped, position, dropped.to(kept.dtype))

    def finish_softmax(self) -> None:
        """Ends the first pass: gathers the positives and merges column statistics over ranks."""
        if not self.needs_positives:
            self.finish_positives()
        for direction, positives in zip(self.directions, self._positives(), strict=True):
            direction.finish_negatives(self.rule.scale * positives, self.collectives)

    def add_hard_negatives(self, scores: Float[Tensor, "n m"], position: TilePosition) -> None:
        """Second pass: adds a tile's sums over hard negatives. Tiles come in any order."""
        rows = self.directions[0]
        if not rows.uses_hard_negatives:
            # Only their number is reported.
            excluded = self.excluded.of_tile(position, scores)
            dropped = self._dropped(scores, excluded, rows, position)
            return rows.count_hard_negatives(
                self._hard(scores, excluded, dropped, position), position
            )
        logits, excluded = self._logits(scores, position)
        for direction in self.directions:
            kept, hard = self._kept(scores, logits, excluded, direction, position)
            assert hard is not None, "the form uses hard negatives"
            direction.add_hard_negatives(kept, hard, position)

    def finish_hard_negatives(self) -> None:
        """Ends the second pass: merges column statistics over ranks."""
        for direction in self.directions:
            if direction.uses_hard_negatives:
                direction.finish_hard_negatives(self.collectives)

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
        result = torch.zeros_like(scores)
        for direction, factor in zip(self.directions, (text_to_video, video_to_text), strict=True):
            kept, hard = self._kept(scores, logits, excluded, direction, position)
            result += direction.gradient(kept, hard, position).mul_(factor)
        return result.mul_(self.rule.scale)

    def shares(self) -> tuple[Tensor, Tensor]:
        """This rank's shares of the text-to-video and of the video-to-text loss."""
        rows, columns = self.directions
        return rows.share(), columns.share()

    def statistics(self) -> tuple[Tensor, ...]:
        """This rank's shares of the statistics of `LossTerms`, from `penalty` on.

        A row without negatives counts as `hardest_similarity` 0.
        """
        rows, columns = self.directions
        penalty = (rows.penalty_share() + columns.penalty_share()) / 2
        clamped = (rows.num_clamped() + columns.num_clamped()).to(penalty) / 2
        hardest = self.hardest.masked_fill(self.hardest == -torch.inf, 0) / self.rule.scale
        alike = self.excluded.by_caption_alone(self.own_columns)
        alike = torch.zeros_like(clamped) if alike is None else alike.to(clamped)
        row_sums = (rows.num_hard, clamped, self.positives, hardest, alike, self.num_dropped)
        return penalty, *(x.sum() / self.num_pairs for x in row_sums)

    def _positives(self) -> tuple[Tensor, Tensor]:
        """Similarities of the matched pairs of the rows and of the columns."""
        return self.positives, self.all_positives

    def _logits(
        self, scores: Tensor, position: TilePosition
    ) -> tuple[Tensor, Bool[Tensor, "n m"] | None]:
        """Scaled scores, and the mask of excluded pairs, whose logit is -inf."""
        logits = self.rule.scale * scores
        excluded = self.excluded.of_tile(position, scores)
        return logits if excluded is None else logits.masked_fill_(excluded, -torch.inf), excluded

    def _kept(
        self,
        scores: Tensor,
        logits: Tensor,
        excluded: Tensor | None,
        direction: DirectionLoss,
        position: TilePosition,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of one direction, -inf where a negative is dropped, and its hard negatives.

        The second is None if the direction does not use it.
        """
        dropped = self._dropped(scores, excluded, direction, position)
        kept = logits if dropped is None else logits.masked_fill(dropped, -torch.inf)
        if not direction.uses_hard_negatives:
            return kept, None
        return kept, self._hard(scores, excluded, dropped, position)

    def _dropped(
        self,
        scores: Tensor,
        excluded: Tensor | None,
        direction: DirectionLoss,
        position: TilePosition,
    ) -> Bool[Tensor, "n m"] | None:
        """Marks the negatives that one direction leaves out; None if there can be none."""
        if self.rule.drop_above is None:
            return None
        positives = self._positives()[1 - direction.shape.dim]
        largest = direction.broadcast(positives, position, scores) + self.rule.drop_above
        dropped = scores > largest
        position.diagonal(dropped)[0].fill_(False)
        return dropped if excluded is None else dropped.logical_and_(~excluded)

    def _hard(
        self,
        scores: Tensor,
        excluded: Tensor | None,
        dropped: Tensor | None,
        position: TilePosition,
    ) -> Tensor:
        rows, columns = self.directions
        row_positives = rows.broadcast(self.positives, position, scores).squeeze(1)
        column_positives = columns.broadcast(self.all_positives, position, scores).squeeze(0)
        hard = exceeds_positive(scores, position, row_positives, column_positives)
        for left_out in (excluded, dropped):
            if left_out is not None:
                hard.logical_and_(~left_out)
        return hard


def _check(num_rows: int, num_pairs: int, row_offset: int) -> None:
    if not 0 <= row_offset <= num_pairs - num_rows:
        raise ValueError(
            f"row_offset={row_offset} with {num_rows} rows exceeds the {num_pairs} pairs; "
            f"allowed are 0 to {num_pairs - num_rows}"
        )
