"""Softmax statistics of rows and columns that are computed tile by tile and merged over ranks.

Rows are texts, columns are videos, and matched pairs lie on the diagonal of the (G, G) square. Each
rank holds the (B, G) rows of its own texts. The text-to-video softmax runs along rows and needs no
other rank. The video-to-text softmax runs along columns: all-reducing G-long statistics (a maximum,
then a sum) is enough, and no rank computes a second block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from tvr.kernels.numerics import at_least_float32


@runtime_checkable
class Collectives(Protocol):
    """Reductions over ranks. Every rank calls the same methods in the same order."""

    def sum(self, x: Tensor) -> Tensor:
        """Sums x over ranks; the backward sums the gradient over ranks."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """Takes the maximum of x over ranks, without gradient."""
        ...


class _SingleRank:
    def sum(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x


SINGLE_RANK: Collectives = _SingleRank()


@dataclass(frozen=True)
class TilePosition:
    """Position of a tile in the global batch."""

    row: int
    """First row, counted among this rank's texts."""
    column: int
    """First column, counted among the videos of all ranks."""
    row_offset: int
    """Row 0 of this rank is row `row_offset` of the (G, G) square."""

    def diagonal(self, tile: Shaped[Tensor, "n m"]) -> tuple[Shaped[Tensor, " k"], int]:
        """Selects the matched pairs of the tile.

        Returns:
            A view of the k matched pairs, empty if there are none; and the tile's row of the first.
        """
        shift = self.row_offset + self.row - self.column
        num_rows, num_columns = tile.shape
        if not -num_rows < shift < num_columns:
            return tile.flatten()[:0], 0
        return tile.diagonal(shift), max(0, -shift)


@dataclass(frozen=True)
class OnlineSoftmax:
    """Running softmax statistics of n rows or n columns.

    The largest logit is kept apart from the others, because 1 - P of that entry is
    exp(rest - total): exact even where P rounds to 1.
    """

    top: Float[Tensor, " n"]
    """Largest logit; -inf before the first tile."""
    rest: Float[Tensor, " n"]
    """Log-sum-exp of all other logits; -inf where there are none."""

    @property
    def total(self) -> Float[Tensor, " n"]:
        """Log-sum-exp of all logits: the softmax's denominator."""
        return torch.logaddexp(self.top, self.rest)

    @classmethod
    def empty(cls, size: int, like: Tensor) -> OnlineSoftmax:
        """Statistics before the first tile, with dtype and device of `like`."""
        return cls(*(like.new_full((size,), -torch.inf) for _ in range(2)))

    @classmethod
    def of_tile(cls, logits: Float[Tensor, "n m"], dim: int) -> OnlineSoftmax:
        """Statistics of one tile alone, along its dimension `dim`."""
        top, index = logits.max(dim, keepdim=True)
        others = logits.scatter(dim, index, -torch.inf)
        return cls(top.squeeze(dim), others.logsumexp(dim))

    def add_tile(self, first: int, tile: OnlineSoftmax) -> None:
        """Merges a tile's statistics into rows (or columns) `first`, `first` + 1, ... in place."""
        covered = slice(first, first + len(tile.top))
        top, rest = self.top[covered], self.rest[covered]
        smaller = torch.minimum(top, tile.top)
        self.rest[covered] = torch.logaddexp(torch.logaddexp(rest, tile.rest), smaller)
        self.top[covered] = torch.maximum(top, tile.top)

    def with_entry(self, logits: Float[Tensor, " n"]) -> OnlineSoftmax:
        """Statistics with one more logit in every row (or column)."""
        rest = torch.logaddexp(self.rest, torch.minimum(self.top, logits))
        return OnlineSoftmax(torch.maximum(self.top, logits), rest)

    def all_reduce(self, collectives: Collectives) -> OnlineSoftmax:
        """Merges the statistics of all ranks, each of which has added other entries."""
        top = collectives.max(self.top)
        holds_top = self.top == top
        rest = torch.where(holds_top, self.rest, self.total)
        peak = collectives.max(rest)
        # A row without entries beside its top on any rank has peak -inf; its mass is exp(-inf) = 0.
        shift = peak.masked_fill(peak == -torch.inf, 0)
        mass, tops = collectives.sum(torch.stack([(rest - shift).exp(), holds_top.to(rest)]))
        # If several ranks hold an equal top, all of these entries but one belong to the rest.
        return OnlineSoftmax(top, torch.logaddexp(mass.log() + shift, top + (tops - 1).log()))


def logsumexp_over_ranks(x: Float[Tensor, "*n"], collectives: Collectives) -> Float[Tensor, "*n"]:
    """Log of the sum of exp(x) over ranks; -inf where every rank has -inf."""
    peak = collectives.max(x)
    shift = peak.masked_fill(peak == -torch.inf, 0)
    return collectives.sum((x - shift).exp()).log() + shift


def hard_negatives(
    block: Float[Tensor, "B G"], *, row_offset: int, collectives: Collectives
) -> Bool[Tensor, "B G"]:
    """Marks the hard negatives H of NegNCE.

    A pair off the diagonal is hard if its similarity exceeds the positive of its row OR of its
    column. An equal similarity is not hard.
    """
    block = at_least_float32(block).detach()
    positives = block.diagonal(row_offset)
    all_positives = gather_positives(positives, row_offset, block.shape[1], collectives)
    return exceeds_positive(block, TilePosition(0, 0, row_offset), positives, all_positives)


def gather_positives(
    own: Float[Tensor, " B"], row_offset: int, num_pairs: int, collectives: Collectives
) -> Float[Tensor, " G"]:
    """Gathers the similarities of all matched pairs from those of this rank's pairs."""
    positives = own.new_zeros(num_pairs)
    positives[row_offset : row_offset + len(own)] = own
    return collectives.sum(positives)


def exceeds_positive(
    tile: Float[Tensor, "n m"],
    position: TilePosition,
    row_positives: Float[Tensor, " n"],
    column_positives: Float[Tensor, " m"],
) -> Bool[Tensor, "n m"]:
    """Marks the pairs of a tile that score above the positive of their row or of their column."""
    above = (tile > row_positives[:, None]) | (tile > column_positives)
    position.diagonal(above)[0].fill_(False)
    return above
