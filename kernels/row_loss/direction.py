"""One direction of a loss: what every form of it offers, along rows (dim 1) or columns (dim 0).

A rank holds the (B, G) rows of its own texts. In the text-to-video direction each of its B rows is
complete. In the video-to-text direction it holds a part of each of the G columns, so a form sums
its column statistics over ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from tvr.kernels.row_loss.loss_rule import LossRule
from tvr.kernels.row_loss.online_softmax import Collectives, TilePosition


@dataclass(frozen=True)
class DirectionShape:
    """Place of one direction in the global batch."""

    dim: int
    """1: a statistic has one number for each row of this rank; 0: for each column."""
    size: int
    """Number of these rows (B) or columns (G)."""
    num_pairs: int
    """G."""
    row_offset: int
    """Row 0 of this rank is row `row_offset` of the (G, G) square."""
    own: slice
    """Rows or columns of this rank's own pairs."""


class DirectionLoss(ABC):
    """One direction of a loss, from tiles of logits.

    Call `add_negatives` with every tile, then `finish_negatives`; then, if `uses_hard_negatives`,
    `add_hard_negatives` with every tile, then `finish_hard_negatives`. `share`, `penalty_share` and
    `gradient` follow. The `finish_` methods are collective.

    Args:
        like: Tensor whose dtype and device the statistics take.
    """

    uses_hard_negatives: ClassVar[bool] = False
    """Whether the loss treats hard negatives apart from the others."""

    def __init__(self, rule: LossRule, shape: DirectionShape, like: Tensor) -> None:
        self.rule, self.shape = rule, shape
        self.positives = like.new_zeros(shape.size)  # logits of the matched pairs
        self.num_hard = like.new_zeros(shape.size)

    @abstractmethod
    def add_negatives(self, logits: Float[Tensor, "n m"], position: TilePosition) -> None:
        """First pass: adds a tile. The logit of a pair that is no negative is -inf."""

    @abstractmethod
    def finish_negatives(self, positives: Tensor, collectives: Collectives) -> None:
        """Ends the first pass. `positives` are the logits of the matched pairs."""

    def add_hard_negatives(
        self, logits: Float[Tensor, "n m"], hard: Bool[Tensor, "n m"], position: TilePosition
    ) -> None:
        """Second pass: adds a tile. The logit is -inf where a pair is neither matched nor a
        negative."""
        self.count_hard_negatives(hard, position)

    def count_hard_negatives(self, hard: Bool[Tensor, "n m"], position: TilePosition) -> None:
        """Adds the number of a tile's hard negatives."""
        self.add_sums(self.num_hard, position, hard.to(self.num_hard.dtype))

    def finish_hard_negatives(self, collectives: Collectives) -> None:  # noqa: B027 (a form may have nothing to do)
        """Ends the second pass."""

    @abstractmethod
    def share(self) -> Tensor:
        """This rank's share of the direction's loss."""

    def penalty_share(self) -> Tensor:
        """The part of `share` that the form adds for hard negatives."""
        return self.positives.new_zeros(())

    def num_clamped(self) -> Tensor:
        """Number of this rank's positives that get no gradient."""
        return self.positives.new_zeros(())

    @abstractmethod
    def gradient(
        self,
        logits: Float[Tensor, "n m"],
        hard: Bool[Tensor, "n m"] | None,
        position: TilePosition,
    ) -> Float[Tensor, "n m"]:
        """Gradient of the direction's loss, summed over ranks, with respect to a tile of logits.

        `hard` is None if the form does not use it.
        """

    def broadcast(self, statistic: Tensor, position: TilePosition, tile: Tensor) -> Tensor:
        """View of a statistic's entries for the rows (or columns) of a tile, broadcast over it."""
        if self.shape.dim == 1:
            first, size = position.row, tile.shape[0]
        else:
            first, size = position.column, tile.shape[1]
        return statistic[first : first + size].unsqueeze(self.shape.dim)

    def first_of_tile(self, position: TilePosition) -> int:
        """First row (or column) of a tile."""
        return position.row if self.shape.dim == 1 else position.column

    def of_matched(self, statistic: Tensor, tile: Tensor, position: TilePosition) -> Tensor:
        """A statistic's entries for the matched pairs of a tile."""
        matched, first = position.diagonal(tile)
        first += position.row + (0 if self.shape.dim == 1 else self.shape.row_offset)
        return statistic[first : first + len(matched)]

    def add_sums(self, statistic: Tensor, position: TilePosition, tile: Tensor) -> None:
        """Adds the tile's sums along this direction to a statistic."""
        sums = tile.sum(self.shape.dim, keepdim=True)
        self.broadcast(statistic, position, tile).add_(sums)
