"""One rank's rows of the global batch, and softmax statistics of lines that are seen in tiles.

Rows are texts, columns videos, matched pairs lie on the diagonal. A rank that holds B of the G
pairs has the (B, G) rows of its texts against everyone's videos. The text-to-video softmax runs
along rows and is local; the video-to-text softmax runs along columns and needs only G-long
statistics over ranks (maximum, then sum), never a second block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from tvr.kernels.reference import raised


@runtime_checkable
class Collectives(Protocol):
    """What the row forms need from the other ranks; every rank calls it in the same order."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x over ranks; its backward is the sum over ranks of the gradient."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """Maximum of x over ranks, without gradient."""
        ...


class _Alone:
    def sum(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x


ALONE: Collectives = _Alone()


@dataclass(frozen=True)
class Place:
    """Where a tile lies: its first row among this rank's texts, its first column among all videos.

    Row i of this rank is row `row_offset` + i of the (G, G) square.
    """

    row: int
    column: int
    row_offset: int

    def diagonal(self, tile: Shaped[Tensor, "n m"]) -> tuple[Shaped[Tensor, " k"], int]:
        """The matched pairs in the tile, as a view, and the first one's row in it."""
        shift = self.row_offset + self.row - self.column
        num_rows, num_columns = tile.shape
        if not -num_rows < shift < num_columns:
            return tile.flatten()[:0], 0
        return tile.diagonal(shift), max(0, -shift)


@dataclass(frozen=True)
class Softmax:
    """Of each line its largest logit and the log-sum-exp of all others.

    Kept apart because 1 - P of a line's largest entry is exp(rest - total), exact even where P
    rounds to 1. Both are -inf for a line of which nothing has been seen.
    """

    top: Float[Tensor, " n"]
    rest: Float[Tensor, " n"]

    @property
    def total(self) -> Float[Tensor, " n"]:
        """Log-sum-exp of the line."""
        return torch.logaddexp(self.top, self.rest)

    @classmethod
    def empty(cls, num_lines: int, like: Tensor) -> Softmax:
        return cls(*(like.new_full((num_lines,), -torch.inf) for _ in range(2)))

    @classmethod
    def of(cls, logits: Float[Tensor, "n m"], dim: int) -> Softmax:
        """Statistics of the lines that run along `dim` of a tile."""
        top, place = logits.max(dim, keepdim=True)
        others = logits.scatter(dim, place, -torch.inf)
        return cls(top.squeeze(dim), others.logsumexp(dim))

    def add(self, first: int, other: Softmax) -> None:
        """Takes up what another tile holds of the lines from `first` on."""
        lines = slice(first, first + len(other.top))
        top, rest = self.top[lines], self.rest[lines]
        loser = torch.minimum(top, other.top)
        self.rest[lines] = torch.logaddexp(torch.logaddexp(rest, other.rest), loser)
        self.top[lines] = torch.maximum(top, other.top)

    def over_ranks(self, collectives: Collectives) -> Softmax:
        """The same lines, of which each rank has seen a part."""
        top = collectives.max(self.top)
        mine_is_top = self.top == top
        rest = torch.where(mine_is_top, self.rest, self.total)
        peak = collectives.max(rest)
        # No rank may have more than the one top entry of a line: then the rest is exp(-inf) = 0.
        shift = peak.masked_fill(peak == -torch.inf, 0)
        mass, tops = collectives.sum(torch.stack([(rest - shift).exp(), mine_is_top.to(rest)]))
        # Where ranks tie for the top, all but one of the tied entries belong to the rest.
        return Softmax(top, torch.logaddexp(mass.log() + shift, top + (tops - 1).log()))


def hard_negatives(
    block: Float[Tensor, "B G"], *, row_offset: int, collectives: Collectives
) -> Bool[Tensor, "B G"]:
    """H: off-diagonal pairs above their row's OR their column's positive; equal is not above."""
    block = raised(block).detach()
    positives = block.diagonal(row_offset)
    everyones = everyones_positives(positives, row_offset, block.shape[1], collectives)
    return above_positive(block, Place(0, 0, row_offset), positives, everyones)


def everyones_positives(
    mine: Float[Tensor, " B"], row_offset: int, num_pairs: int, collectives: Collectives
) -> Float[Tensor, " G"]:
    """The similarities of all matched pairs, of which this rank knows its own."""
    everyone = mine.new_zeros(num_pairs)
    everyone[row_offset : row_offset + len(mine)] = mine
    return collectives.sum(everyone)


def above_positive(
    tile: Float[Tensor, "n m"],
    place: Place,
    of_rows: Float[Tensor, " n"],
    of_columns: Float[Tensor, " m"],
) -> Bool[Tensor, "n m"]:
    """Pairs of a tile that score above the matched pair of their row or of their column."""
    above = (tile > of_rows[:, None]) | (tile > of_columns)
    place.diagonal(above)[0].fill_(False)
    return above
