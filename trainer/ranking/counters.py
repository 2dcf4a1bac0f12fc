"""What is kept of the tiles: counts that give ranks, and the best videos of each caption."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tvr.kernels.ranking import (
    CandidateCounts,
    DirectionRanks,
    Positives,
    answer_quality,
    count_candidates,
    ranks_of_counts,
)
from tvr.trainer.distributed.collectives import all_gather_rows, sum_over_ranks
from tvr.trainer.distributed.world import World
from tvr.trainer.ranking.caption_blocks import BlockLayout, CaptionBlock
from tvr.trainer.ranking.right_pairs import RightPairs, rows_and_scores, several_anywhere
from tvr.trainer.ranking.sweep import Tile

View = Callable[[Tile], Tensor]
"""The scores by which a tile is ranked; `raw` are the similarities."""


def raw(tile: Tile) -> Tensor:
    """The similarities themselves."""
    return tile.scores


class TextRanks:
    """Ranks of all captions: counts of a caption are summed over the ranks."""

    def __init__(
        self,
        pairs: RightPairs,
        scores: Tensor,
        layout: BlockLayout,
        world: World,
        view: View = raw,
    ) -> None:
        self._pairs, self._scores, self._layout = pairs, scores, layout
        self._world, self._view = world, view
        self._counts: list[Tensor] = []
        self._quality: list[Tensor] = []
        self._several = False

    def start(self, block: CaptionBlock) -> None:
        """Gathers the scores of the block's right answers."""
        rows, scores = rows_and_scores(self._pairs, self._scores, block, self._world)
        self._right = Positives.of(rows, scores, len(block.captions))
        device = self._world.device
        self._of_block = CandidateCounts(
            torch.zeros(len(block.captions), 2, dtype=torch.int64, device=device),
            torch.zeros_like(self._right.query),
        )

    def add(self, tile: Tile) -> None:
        """Counts the wrong videos of the tile."""
        scores = self._view(tile)
        scores[tile.right] = -torch.inf
        found = count_candidates(scores, self._right, dim=1)
        for total, more in zip(self._of_block, found, strict=True):
            total += more

    def finish(self, block: CaptionBlock) -> None:
        """Sums the counts over the ranks and keeps those of the rank's own captions."""
        counts = CandidateCounts(*(sum_over_ranks(each, self._world) for each in self._of_block))
        self._counts.append(counts.best[block.own])
        self._quality.append(answer_quality(counts, self._right.query)[block.own])
        self._several |= len(self._right.query) > 0  # the same on every rank

    def result(self) -> DirectionRanks:
        """The ranks of all captions, on the CPU of every rank."""
        quality = torch.cat(self._quality) if self._several else None
        return _everyones(torch.cat(self._counts), quality, self._layout.num_captions, self._world)


class VideoRanks:
    """Ranks of all videos: all counts of a video are made on its own rank."""

    def __init__(
        self,
        pairs: RightPairs,
        scores: Tensor,
        num_videos: tuple[int, ...],
        world: World,
        view: View = raw,
    ) -> None:
        self._world, self._view, self._num_videos = world, view, num_videos
        own = num_videos[world.rank]
        self._right = Positives.of(pairs.video, scores, own)
        self._several = several_anywhere(len(self._right.query) > 0, world)
        self._counts = CandidateCounts(
            torch.zeros(own, 2, dtype=torch.int64, device=world.device),
            torch.zeros_like(self._right.query),
        )

    def start(self, block: CaptionBlock) -> None:
        """Does nothing."""

    def add(self, tile: Tile) -> None:
        """Counts the wrong captions of the tile."""
        scores, columns = self._view(tile), tile.columns
        scores[tile.right] = -torch.inf
        further = slice(0, 0)
        if len(self._right.query):
            edges = torch.tensor([columns.start, columns.stop], device=scores.device)
            further = slice(*torch.searchsorted(self._right.query, edges).tolist())
        right = Positives(
            self._right.best[columns],
            self._right.query[further] - columns.start,
            self._right.score[further],
        )
        found = count_candidates(scores, right, dim=0)
        self._counts.best[columns] += found.best
        self._counts.further[further] += found.further

    def finish(self, block: CaptionBlock) -> None:
        """Does nothing."""

    def result(self) -> tuple[DirectionRanks, Tensor]:
        """The ranks of all videos that have a caption, and their numbers, on every rank's CPU."""
        quality = answer_quality(self._counts, self._right.query) if self._several else None
        found = _everyones(self._counts.best, quality, self._num_videos, self._world)
        is_query = all_gather_rows(self._right.best, self._world, self._num_videos).isfinite()
        videos = is_query.nonzero().squeeze(1).cpu()
        quality = None if found.quality is None else found.quality[videos]
        return DirectionRanks(found.rank[videos], found.ties[videos], quality), videos


class TopVideos:
    """The best videos of all captions, on rank 0."""

    def __init__(self, layout: BlockLayout, size: int, world: World) -> None:
        self.size = size
        self._world = world
        rows = sum(layout.num_captions) if world.is_first else 0
        self.scores = torch.empty(rows, size)
        self.videos = torch.empty(rows, size, dtype=torch.int64)

    def start(self, block: CaptionBlock) -> None:
        """Begins with no video."""
        device = self._world.device
        self._scores = torch.empty(len(block.captions), 0, device=device)
        self._videos = torch.empty(len(block.captions), 0, dtype=torch.int64, device=device)

    def add(self, tile: Tile) -> None:
        """Keeps the best of the tile and of those before."""
        found, columns = _best_columns(tile.scores, self.size)
        scores = torch.cat([self._scores, found.to(self._scores.dtype)], dim=1)
        videos = torch.cat([self._videos, columns + tile.first_video], dim=1)
        self._scores, self._videos = _best_of(scores, videos, self.size)

    def finish(self, block: CaptionBlock) -> None:
        """Merges the best of all ranks."""
        scores, videos = self._filled()
        same = (len(scores),) * self._world.world_size
        scores = all_gather_rows(scores, self._world, same)
        videos = all_gather_rows(videos, self._world, same)
        if not self._world.is_first:
            return
        shape = (self._world.world_size, -1, self.size)
        scores = scores.view(shape).transpose(0, 1).flatten(1)
        videos = videos.view(shape).transpose(0, 1).flatten(1)
        scores, videos = _best_of(scores, videos, self.size)
        rows = block.captions.cpu()
        self.scores[rows], self.videos[rows] = scores.cpu(), videos.cpu()

    def _filled(self) -> tuple[Tensor, Tensor]:
        """Scores and videos in exactly `size` columns; a missing one has the score -inf."""
        missing = self.size - self._scores.shape[1]
        pad = torch.nn.functional.pad
        scores = pad(self._scores, (0, missing), value=-torch.inf)
        return scores, pad(self._videos, (0, missing))


def _best_columns(scores: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The best `size` of each row of a tile; of equal scores those with the lower columns."""
    found = scores.topk(min(size + 1, scores.shape[1]), dim=1)
    values, columns = found.values[:, :size], found.indices[:, :size]
    if found.values.shape[1] > size:
        # Which of equal scores topk takes depends on the shape of the tile.
        tied = (found.values[:, size - 1] == found.values[:, size]).nonzero().squeeze(1)
        if len(tied):
            columns = columns.clone()
            order = scores[tied].argsort(dim=1, descending=True, stable=True)
            columns[tied] = order[:, :size]
            values = scores.gather(1, columns)
    return values, columns


def _best_of(scores: Tensor, videos: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The best `size` of each row, best first; of equal scores the lower number first."""
    by_number = videos.argsort(dim=1, stable=True)
    scores, videos = scores.gather(1, by_number), videos.gather(1, by_number)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :size]
    return scores.gather(1, order), videos.gather(1, order)


def _everyones(
    counts: Tensor, quality: Tensor | None, num_rows: tuple[int, ...], world: World
) -> DirectionRanks:
    rank, ties = ranks_of_counts(all_gather_rows(counts, world, num_rows))
    if quality is not None:
        quality = all_gather_rows(quality.to(world.device), world, num_rows).cpu()
    return DirectionRanks(rank.cpu(), ties.cpu(), quality)
