"""One pass of all captions over this rank's videos, tile by tile.

The door of the package. Counters see every tile and keep what they need of it; no table of all
pairs is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tvr.kernels.ranking import check_finite
from tvr.trainer.distributed.world import World
from tvr.trainer.model.model import Features
from tvr.trainer.ranking.caption_blocks import BlockLayout, CaptionBlock, Score, videos_of
from tvr.trainer.ranking.right_pairs import RightPairs

SCORES_PER_TILE = 1 << 22
"""Scores that are held at a time: 16 MiB, four times as much again while they are counted, and
eight times as much while they are rescored."""


class Tile(NamedTuple):
    """The scores of a block's captions with some of this rank's videos."""

    scores: Tensor
    """(A, C)"""
    columns: slice
    """Rows of the videos among the rank's own."""
    first_video: int
    """Number of the first of them through all ranks."""
    captions: Tensor
    """(A,) number of each caption through all ranks."""
    right: tuple[Tensor, Tensor]
    """Rows and columns of the right pairs within the tile."""


class Counter(Protocol):
    """What is kept of a pass. Only `start` and `finish` may use collectives."""

    def start(self, block: CaptionBlock) -> None:
        """Begins a block."""
        ...

    def add(self, tile: Tile) -> None:
        """Adds a tile; may overwrite its scores at right pairs by -inf."""
        ...

    def finish(self, block: CaptionBlock) -> None:
        """Ends a block."""
        ...


def sweep(
    own: Features,
    texts: Features,
    score: Score,
    layout: BlockLayout,
    pairs: RightPairs | None,
    first_video: int,
    counters: Sequence[Counter],
    world: World,
    scores_per_tile: int = SCORES_PER_TILE,
    kind: str = "caption",
) -> None:
    """Scores all captions of all ranks with this rank's videos. All ranks call it.

    Args:
        own: Features of the rank's videos.
        texts: Features of the rank's captions.
        layout: Division of the captions into blocks.
        pairs: The right pairs; None: the captions belong to no video.
        first_video: Number of the rank's first video through all ranks.
        counters: They see each tile in this order; those that read right scores come first.
        kind: Name of the captions in errors.

    Raises:
        ValueError: a similarity is not finite; names caption and video.
    """
    for block in layout.blocks(texts, world):
        for counter in counters:
            counter.start(block)
        rows = columns = torch.zeros(0, dtype=torch.int64, device=world.device)
        if pairs is not None:
            part = pairs.of_block(block.number)
            rows, columns = pairs.row[part], pairs.video[part]
        work = partial(
            _add_tiles, own, block, score, rows, columns, first_video, counters, world.device
        )
        # On every rank at once: the others would wait for a rank that leaves alone.
        world.run_on_all(partial(work, scores_per_tile, kind), ValueError)
        for counter in counters:
            counter.finish(block)


def _add_tiles(
    own: Features,
    block: CaptionBlock,
    score: Score,
    rows: Tensor,
    columns: Tensor,
    first_video: int,
    counters: Sequence[Counter],
    device: torch.device,
    scores_per_tile: int,
    kind: str,
) -> None:
    width = max(1, scores_per_tile // max(1, len(block.captions)))
    for start in range(0, len(own.frames), width):
        some = slice(start, min(start + width, len(own.frames)))
        scores = score(block.texts, videos_of(own, some, device))
        check_finite(scores, _names(kind, block, first_video + start))
        inside = ((columns >= start) & (columns < some.stop)).nonzero().squeeze(1)
        right = (rows[inside], columns[inside] - start)
        tile = Tile(scores, some, first_video + start, block.captions, right)
        for counter in counters:
            counter.add(tile)


def _names(kind: str, block: CaptionBlock, first_video: int) -> Callable[[int, int], str]:
    def names(row: int, column: int) -> str:
        return f"{kind} {int(block.captions[row])} with video {first_video + column}"

    return names
