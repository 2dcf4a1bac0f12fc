"""Ranks of a test set whose videos are spread over the ranks, without a table of all pairs.

Each rank holds the features of its own videos and of their captions. The captions pass by all ranks
in blocks: every rank scores the block with its own videos, tile by tile, and keeps counts only. A
caption's rank is a sum of such counts over the ranks; a video's rank is a sum over the blocks, all
on the rank of the video. Memory does not grow with the number of captions, except for a few bytes
each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tvr.kernels.ranking import (
    Ranks,
    best_of_videos,
    check_finite,
    count_candidates,
    ranks_of_counts,
)
from tvr.trainer.distributed.collectives import all_gather_rows, sum_over_ranks
from tvr.trainer.distributed.world import World
from tvr.trainer.model.model import Features

Score = Callable[[Features, Features], Tensor]
"""Similarity (A, C) of the captions of one record with the videos of another."""

CAPTIONS_PER_BLOCK = 2048
"""Captions of all ranks that are scored at a time."""
SCORES_PER_TILE = 1 << 22
"""Scores that are held at a time: 16 MiB, and as much again while they are counted."""


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The ranks of a test set, and the best videos of each caption.

    Captions and videos are numbered through all ranks, in rank order.
    """

    ranks: Ranks
    """The same on every rank."""
    top_videos: Tensor
    """(A, k) the best videos of each caption, best first. Rank 0 has them, the others have no
    rows."""
    top_scores: Tensor
    """(A, k) their similarities."""


class _Block(NamedTuple):
    """Captions of all ranks, in rank order."""

    texts: Features
    video: Tensor
    """(A,) each caption's video."""
    positives: Tensor
    """(A,) the score with that video."""
    counts: tuple[int, ...]
    """Number of captions of each rank."""


def rank_features(
    own: Features,
    caption_video: Tensor,
    score: Score,
    world: World,
    *,
    top_videos: int = 5,
    captions_per_block: int = CAPTIONS_PER_BLOCK,
    scores_per_tile: int = SCORES_PER_TILE,
) -> Retrieval:
    """Ranks every caption among all videos, and every video among all captions.

    All ranks call it. A wrong candidate that scores the same as the positive ranks before it.

    Args:
        own: Features of this rank's A captions and C videos, on any device: blocks and tiles are
            copied to the device of `world`, so that memory-mapped features need no more memory.
        caption_video: (A,) row of each caption's video among the rank's own.
        score: Computes the similarity; see `similarity_rows`.
        top_videos: Number of best videos to return.

    Raises:
        ValueError: no rank has a caption, or a similarity is not finite.
    """
    num_captions = world.all_gather_counts(len(caption_video))
    num_videos = world.all_gather_counts(len(own.frames))
    if not sum(num_captions):
        raise ValueError("a set without captions cannot be ranked")
    first_video = sum(num_videos[: world.rank])
    part = max(1, captions_per_block // world.world_size)
    caption_video = caption_video.to(world.device)
    with torch.no_grad():
        # Of one type on every rank, also on one without captions.
        positives = _positives(own, caption_video, score, world, part).float()
        video_positives = best_of_videos(positives, caption_video, len(own.frames))
        of_videos = torch.zeros(len(own.frames), 2, dtype=torch.int64, device=world.device)
        of_captions = [of_videos[:0]]
        top = _TopVideos(num_captions, part, min(top_videos, sum(num_videos)), world)

        def count(block: _Block, best: _Best) -> Tensor:
            """Counts a block's candidates among this rank's videos; returns those of the texts."""
            of_block = torch.zeros(len(block.video), 2, dtype=torch.int64, device=world.device)
            width = max(1, scores_per_tile // max(1, len(block.video)))
            for start in range(0, len(own.frames), width):
                columns = slice(start, min(start + width, len(own.frames)))
                scores = score(block.texts, _videos(own, columns, world.device))
                check_finite(scores, _names(block, first_video + start))
                best.add(scores, first_video + start)
                in_tile = block.video - (first_video + start)
                rows = ((in_tile >= 0) & (in_tile < scores.shape[1])).nonzero().squeeze(1)
                counts = count_candidates(
                    scores, block.positives, video_positives[columns], (rows, in_tile[rows])
                )
                of_block += counts.of_texts
                of_videos[columns] += counts.of_videos
            return of_block

        video = caption_video + first_video
        for block in _blocks(own, video, positives, world, part, num_captions):
            best = _Best(top.size, len(block.video), world.device)
            # On every rank at once: the others would wait for a rank that leaves alone.
            of_block = world.run_on_all(partial(count, block, best), ValueError)
            of_all = sum_over_ranks(of_block, world).split(block.counts)
            of_captions.append(of_all[world.rank])
            top.add(best, block.counts)

    of_texts = all_gather_rows(torch.cat(of_captions), world, num_captions)
    text_ranks, text_ties = ranks_of_counts(of_texts)
    video_ranks, video_ties = ranks_of_counts(all_gather_rows(of_videos, world, num_videos))
    videos = all_gather_rows(video_positives, world, num_videos).isfinite().nonzero().squeeze(1)
    return Retrieval(
        ranks=Ranks(
            text_to_video=text_ranks.cpu(),
            text_ties=text_ties.cpu(),
            videos=videos.cpu(),
            video_to_text=video_ranks[videos].cpu(),
            video_ties=video_ties[videos].cpu(),
        ),
        top_videos=top.videos,
        top_scores=top.scores,
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

    A block scores its captions with the videos that occur in it. If captions are in the order of
    their videos, that is few more pairs than those asked for.
    """
    found: list[Tensor] = [torch.zeros(0, device=device)]
    for captions, columns in zip(
        caption.split(pairs_per_block), video.split(pairs_per_block), strict=True
    ):
        chosen, place = columns.unique(return_inverse=True)
        scores = score(_texts(texts, captions, device), _videos(videos, chosen, device))
        rows = torch.arange(len(captions), device=device)
        found.append(scores[rows, place.to(device)])
    return torch.cat(found)


class _Best:
    """The best videos of a block's captions among this rank's own."""

    def __init__(self, size: int, captions: int, device: torch.device) -> None:
        self.size = size
        self.scores = torch.empty(captions, 0, device=device)
        self.videos = torch.empty(captions, 0, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, first_video: int) -> None:
        """Adds a tile, whose first column is the video `first_video`."""
        found = scores.topk(min(self.size, scores.shape[1]), dim=1)
        self.scores = torch.cat([self.scores, found.values.to(self.scores.dtype)], dim=1)
        self.videos = torch.cat([self.videos, found.indices + first_video], dim=1)
        self.scores, self.videos = _best_of(self.scores, self.videos, self.size)

    def filled(self) -> tuple[Tensor, Tensor]:
        """Scores and videos in exactly `size` columns; a missing one has the score -inf."""
        missing = self.size - self.scores.shape[1]
        pad = torch.nn.functional.pad
        return pad(self.scores, (0, missing), value=-torch.inf), pad(self.videos, (0, missing))


class _TopVideos:
    """The best videos of all captions, on rank 0."""

    def __init__(self, num_captions: tuple[int, ...], part: int, size: int, world: World) -> None:
        self.size = size
        self._world = world
        rows = sum(num_captions) if world.is_first else 0
        self.scores = torch.empty(rows, size)
        self.videos = torch.empty(rows, size, dtype=torch.int64)
        self._next = [sum(num_captions[:rank]) for rank in range(world.world_size)]

    def add(self, best: _Best, counts: tuple[int, ...]) -> None:
        """Adds a block, of which every rank has the best of its own videos."""
        scores, videos = best.filled()
        same = (len(scores),) * self._world.world_size
        scores = all_gather_rows(scores, self._world, same)
        videos = all_gather_rows(videos, self._world, same)
        if not self._world.is_first:
            return
        shape = (self._world.world_size, -1, self.size)
        scores = scores.view(shape).transpose(0, 1).flatten(1)
        videos = videos.view(shape).transpose(0, 1).flatten(1)
        scores, videos = _best_of(scores, videos, self.size)
        rows = zip(scores.cpu().split(counts), videos.cpu().split(counts), strict=True)
        for rank, (of_rank, which) in enumerate(rows):
            place = slice(self._next[rank], self._next[rank] + len(of_rank))
            self.scores[place], self.videos[place] = of_rank, which
            self._next[rank] = place.stop


def _best_of(scores: Tensor, videos: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The best `size` of each row, best first; of equal scores the lower number first."""
    by_number = videos.argsort(dim=1, stable=True)
    scores, videos = scores.gather(1, by_number), videos.gather(1, by_number)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :size]
    return scores.gather(1, order), videos.gather(1, order)


def _positives(
    own: Features, caption_video: Tensor, score: Score, world: World, part: int
) -> Tensor:
    """(A,) scores of this rank's captions with their videos."""
    captions = torch.arange(len(caption_video), device=caption_video.device)
    return paired_scores(
        own, own, captions, caption_video, score, world.device, pairs_per_block=part
    )


def _blocks(
    own: Features,
    video: Tensor,
    positives: Tensor,
    world: World,
    part: int,
    num_captions: tuple[int, ...],
) -> Iterator[_Block]:
    """Yields the captions of all ranks, `part` of each rank at a time."""
    for start in range(0, max(num_captions), part):
        counts = tuple(min(max(count - start, 0), part) for count in num_captions)
        rows = slice(start, start + part)
        texts = _texts(own, rows, world.device)

        def gathered(x: Tensor, counts: tuple[int, ...] = counts) -> Tensor:
            return all_gather_rows(x, world, counts)

        yield _Block(
            texts._replace(
                sentence=gathered(texts.sentence),
                words=gathered(texts.words),
                word_mask=gathered(texts.word_mask),
                word_logits=None if texts.word_logits is None else gathered(texts.word_logits),
            ),
            gathered(video[rows]),
            gathered(positives[rows]),
            counts,
        )


def _texts(features: Features, rows: slice | Tensor, device: torch.device) -> Features:
    """Some captions, on the device, without videos."""
    logits = features.word_logits
    return features._replace(
        sentence=_part(features.sentence, rows, device),
        words=_part(features.words, rows, device),
        word_mask=_part(features.word_mask, rows, device),
        word_logits=None if logits is None else _part(logits, rows, device),
    )


def _videos(features: Features, rows: slice | Tensor, device: torch.device) -> Features:
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


def _names(block: _Block, first_video: int) -> Callable[[int, int], str]:
    def names(row: int, column: int) -> str:
        video = int(block.video[row])
        return f"a caption of video {video} with video {first_video + column}"

    return names
