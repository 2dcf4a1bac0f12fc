"""Captions of all ranks in blocks: every rank sees all captions, and never holds more than a block.

Captions and videos are numbered through all ranks, in rank order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tvr.trainer.distributed.collectives import all_gather_rows
from tvr.trainer.distributed.world import World
from tvr.trainer.model.model import Features

Score = Callable[[Features, Features], Tensor]
"""Similarity (A, C) of the captions of one record with the videos of another."""

CAPTIONS_PER_BLOCK = 2048
"""Captions of all ranks that are scored at a time."""


class CaptionBlock(NamedTuple):
    """Captions of all ranks, in rank order."""

    texts: Features
    number: int
    """Number of the block, from 0."""
    captions: Tensor
    """(A,) number of each caption, on the device."""
    own: slice
    """Rows of this rank's captions."""
    counts: tuple[int, ...]
    """Number of captions of each rank."""


@dataclass(frozen=True)
class BlockLayout:
    """Which captions form which block: `part` of each rank at a time."""

    num_captions: tuple[int, ...]
    """Captions of each rank."""
    part: int
    firsts: list[int] = field(init=False)
    """Number of each rank's first caption."""

    def __post_init__(self) -> None:
        counts = self.num_captions
        firsts = [sum(counts[:rank]) for rank in range(len(counts))]
        object.__setattr__(self, "firsts", firsts)

    def __len__(self) -> int:
        """Number of blocks."""
        return -(-max(self.num_captions) // self.part)

    def counts(self, block: int) -> tuple[int, ...]:
        """Captions of each rank in a block."""
        start = block * self.part
        return tuple(min(max(count - start, 0), self.part) for count in self.num_captions)

    def captions(self, block: int) -> Tensor:
        """(A,) numbers of a block's captions."""
        start = block * self.part
        ranges = zip(self.firsts, self.counts(block), strict=True)
        return torch.cat(
            [torch.arange(first + start, first + start + count) for first, count in ranges]
        )

    def places(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Block of each caption, and its row there."""
        firsts = torch.tensor(self.firsts)
        ends = firsts + torch.tensor(self.num_captions)
        rank = torch.searchsorted(ends, captions, right=True)
        local = captions - firsts[rank]
        block, row = local // self.part, local % self.part
        counts = torch.tensor([self.counts(number) for number in range(len(self))])
        return block, row + (counts.cumsum(1) - counts)[block, rank]

    def blocks(self, own: Features, world: World) -> Iterator[CaptionBlock]:
        """Yields every block; all ranks call it. `own` holds this rank's captions."""
        for number in range(len(self)):
            counts, start = self.counts(number), number * self.part
            first = sum(counts[: world.rank])
            texts = captions_of(own, slice(start, start + self.part), world.device)
            yield CaptionBlock(
                gathered_captions(texts, world, counts),
                number,
                self.captions(number).to(world.device),
                slice(first, first + counts[world.rank]),
                counts,
            )


def gathered_captions(texts: Features, world: World, counts: Sequence[int]) -> Features:
    """The captions of all ranks, in rank order."""

    def gathered(x: Tensor) -> Tensor:
        return all_gather_rows(x, world, counts)

    return texts._replace(
        sentence=gathered(texts.sentence),
        words=gathered(texts.words),
        word_mask=gathered(texts.word_mask),
        word_logits=None if texts.word_logits is None else gathered(texts.word_logits),
    )


def paired_scores(
    texts: Features,
    videos: Features,
    caption: Tensor,
    video: Tensor,
    score: Score,
    device: torch.device,
    *,
    pairs_per_block: int = CAPTIONS_PER_BLOCK,
) -> Tensor:
    """(P,) similarities of single pairs, given by rows of `texts` and of `videos`.

    A block of pairs scores its captions with the videos that occur in it, which are no more than
    its pairs: at most `pairs_per_block` squared scores at a time.
    """
    found: list[Tensor] = [torch.zeros(0, device=device)]
    for rows, columns in zip(
        caption.split(pairs_per_block), video.split(pairs_per_block), strict=True
    ):
        chosen, place = columns.unique(return_inverse=True)
        scores = score(captions_of(texts, rows, device), videos_of(videos, chosen, device))
        pairs = torch.arange(len(rows), device=device)
        found.append(scores[pairs, place.to(device)])
    return torch.cat(found)


def captions_of(features: Features, rows: slice | Tensor, device: torch.device) -> Features:
    """Some captions, on the device, without videos."""
    logits = features.word_logits
    return features._replace(
        sentence=_part(features.sentence, rows, device),
        words=_part(features.words, rows, device),
        word_mask=_part(features.word_mask, rows, device),
        word_logits=None if logits is None else _part(logits, rows, device),
    )


def videos_of(features: Features, rows: slice | Tensor, device: torch.device) -> Features:
    """Some videos, on the device, without captions."""
    logits = features.frame_logits
    return features._replace(
        frames=_part(features.frames, rows, device),
        frame_mask=_part(features.frame_mask, rows, device),
        frame_logits=None if logits is None else _part(logits, rows, device),
    )


def _part(x: Tensor, rows: slice | Tensor, device: torch.device) -> Tensor:
    part = (x[rows] if isinstance(rows, slice) else x[rows.to(x.device)]).to(device)
    # Features are stored in half precision to save space, not to compute in it.
    return part.float() if part.dtype == torch.float16 else part
