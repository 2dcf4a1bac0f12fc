"""One rank's rows of the global batch's logits, and the softmax statistics of both directions.

Rows are texts, columns videos, matched pairs lie on the diagonal. A rank that holds B of the G
pairs has the (B, G) block of its texts against everyone's videos. The text-to-video softmax runs
along rows and is local; the video-to-text softmax runs along columns and needs only G-long
statistics over ranks (maximum, then sum), never a second block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
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
class Rows:
    """A block as logits (excluded pairs at -inf) with its hard negatives.

    Row i of the block is row `row_offset` + i of the (G, G) square.
    """

    logits: Float[Tensor, "B G"]
    hard: Bool[Tensor, "B G"]
    row_offset: int
    collectives: Collectives

    @property
    def num_pairs(self) -> int:
        return self.logits.shape[1]

    @property
    def directions(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Log-sum-exp over videos (B, 1), and over the texts of all ranks (1, G)."""
        return self._over_videos, self._over_texts

    def of_positives(self, x: Float[Tensor, "B G"]) -> Float[Tensor, " B"]:
        """The entries of this rank's positives: of its texts and, equally, of its own videos."""
        return x.diagonal(self.row_offset)

    def _over_videos(self, x: Float[Tensor, "B G"]) -> Float[Tensor, "B 1"]:
        return x.logsumexp(dim=1, keepdim=True)

    def _over_texts(self, x: Float[Tensor, "B G"]) -> Float[Tensor, "1 G"]:
        # A rank's part of a column may be all -inf, the whole column never is: it holds the
        # positive. So the maximum over ranks is finite; detached, it leaves the gradient exact.
        top = self.collectives.max(x.detach().amax(dim=0))
        total = self.collectives.sum((x - top).exp().sum(dim=0))
        return (top + total.log())[None]


def make_rows(
    block: Tensor,
    *,
    row_offset: int,
    collectives: Collectives,
    video_ids: Tensor | None,
    mask_same_video: bool,
    scale: float,
) -> Rows:
    """Rows of scale x block; with `mask_same_video` other pairs of equal video id are excluded.

    Raises:
        ValueError: rows outside the square, a mask without ids, or ids of another length.
    """
    num_rows, num_pairs = block.shape
    if not 0 <= row_offset <= num_pairs - num_rows:
        raise ValueError(
            f"row_offset={row_offset} with {num_rows} rows leaves the {num_pairs} pairs; "
            f"allowed are 0 to {num_pairs - num_rows}"
        )
    if mask_same_video and video_ids is None:
        raise ValueError("mask_same_video=True needs video_ids of all G pairs, but None was passed")
    if video_ids is not None and video_ids.shape != (num_pairs,):
        raise ValueError(
            f"video_ids has shape {tuple(video_ids.shape)} but must hold the ids of all "
            f"{num_pairs} pairs of the global batch"
        )
    block = raised(block)
    hard = hard_negatives(block, row_offset=row_offset, collectives=collectives)
    logits = scale * block
    if mask_same_video and video_ids is not None:
        same = video_ids[row_offset : row_offset + num_rows, None] == video_ids
        same.diagonal(row_offset).fill_(False)
        hard, logits = hard & ~same, logits.masked_fill(same, -torch.inf)
    return Rows(logits, hard, row_offset, collectives)


def hard_negatives(
    block: Float[Tensor, "B G"], *, row_offset: int, collectives: Collectives
) -> Bool[Tensor, "B G"]:
    """H: off-diagonal pairs above their row's OR their column's positive; equal is not above."""
    block = raised(block).detach()
    positives = block.diagonal(row_offset)
    everyones = block.new_zeros(block.shape[1])
    everyones[row_offset : row_offset + len(block)] = positives
    everyones = collectives.sum(everyones)
    hard = (block > positives[:, None]) | (block > everyones)
    hard.diagonal(row_offset).fill_(False)
    return hard
