"""Ranks of a test set whose videos are spread over the ranks, without a table of all pairs.

Each rank holds the features of its own videos and of their captions. The captions pass by all ranks
in blocks: every rank scores the block with its own videos, tile by tile, and keeps counts only. A
caption's rank is a sum of such counts over the ranks; a video's rank is a sum over the blocks, all
on the rank of the video. Memory does not grow with the number of captions, except for a few bytes
each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tvr.kernels.ranking import Ranks
from tvr.trainer.distributed.world import World
from tvr.trainer.model.model import Features
from tvr.trainer.ranking.caption_blocks import (
    CAPTIONS_PER_BLOCK,
    BlockLayout,
    Score,
    paired_scores,
)
from tvr.trainer.ranking.counters import TextRanks, TopVideos, VideoRanks
from tvr.trainer.ranking.rescoring import RescoredRanks, Rescorer, Rescoring
from tvr.trainer.ranking.right_pairs import count_equal_captions, scored_pairs
from tvr.trainer.ranking.sweep import SCORES_PER_TILE, sweep

__all__ = [
    "CAPTIONS_PER_BLOCK",
    "SCORES_PER_TILE",
    "Rescoring",
    "Retrieval",
    "Score",
    "paired_scores",
    "rank_features",
]


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The ranks of a test set, and the best videos of each caption.

    Captions and videos are numbered through all ranks, in rank order.
    """

    ranks: Ranks
    """The same on every rank."""
    equal_captions: int | None
    """Captions that equal a caption of another video; None without `caption_ids`."""
    top_videos: Tensor
    """(A, k) the best videos of each caption, best first. Rank 0 has them, the others have no
    rows."""
    top_scores: Tensor
    """(A, k) their similarities."""
    rescored: dict[str, RescoredRanks]
    """Ranks by other scores, by the names "dual_softmax" and "qb_norm"; the same on every rank."""


def rank_features(
    own: Features,
    caption_video: Tensor,
    score: Score,
    world: World,
    *,
    caption_ids: Tensor | None = None,
    merge_equal: bool = False,
    rescoring: Rescoring | None = None,
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
        caption_ids: (A,) equal numbers for equal captions, as `hash_caption` gives; None: they are
            not known.
        merge_equal: The videos of equal captions are right for all of these captions.
        rescoring: Other scores to rank by as well. It does not change the raw ranks.
        top_videos: Number of best videos to return.

    Raises:
        ValueError: no rank has a caption, `caption_video` does not fit the features, a similarity
            is not finite, `merge_equal` without `caption_ids`, or the bank of `rescoring` is empty.
    """
    if merge_equal and caption_ids is None:
        raise ValueError("equal captions can be merged only if the captions' texts are known")
    # On every rank at once: the others would wait for a rank that leaves alone.
    world.run_on_all(lambda: _check(own, caption_video, caption_ids), ValueError)
    num_captions = world.all_gather_counts(len(caption_video))
    num_videos = world.all_gather_counts(len(own.frames))
    if not sum(num_captions):
        raise ValueError("a set without captions cannot be ranked")
    first = sum(num_videos[: world.rank])
    videos = range(first, first + num_videos[world.rank])
    layout = BlockLayout(num_captions, max(1, captions_per_block // world.world_size))
    with torch.no_grad():
        equal = None
        if caption_ids is not None:
            equal = count_equal_captions(caption_video, caption_ids, layout, videos, world)
        ids = caption_ids if merge_equal else None
        pairs = scored_pairs(own, caption_video, ids, score, layout, videos, world)
        best = TopVideos(layout, min(top_videos, sum(num_videos)), world)
        texts = TextRanks(pairs, pairs.score, layout, world)
        columns = VideoRanks(pairs, pairs.score, num_videos, world)
        rescorer = None
        if rescoring is not None:
            rescorer = Rescorer(own, score, layout, num_videos, rescoring, world, scores_per_tile)
        # The raw ranks come last: they overwrite the scores of right pairs.
        statistics = [] if rescorer is None else rescorer.statistics
        counters = [best, *statistics, texts, columns]
        sweep(own, own, score, layout, pairs, first, counters, world, scores_per_tile)
        rescored = {} if rescorer is None else rescorer.ranks(pairs)
    of_videos, queries = columns.result()
    return Retrieval(
        ranks=Ranks.of(texts.result(), of_videos, queries),
        equal_captions=equal,
        top_videos=best.videos,
        top_scores=best.scores,
        rescored=rescored,
    )


def _check(own: Features, caption_video: Tensor, caption_ids: Tensor | None) -> None:
    captions, videos = len(own.sentence), len(own.frames)
    if len(caption_video) != captions:
        raise ValueError(
            f"caption_video has {len(caption_video)} rows for {captions} captions; each needs one"
        )
    if caption_ids is not None and len(caption_ids) != captions:
        raise ValueError(
            f"caption_ids has {len(caption_ids)} rows for {captions} captions; each needs one"
        )
    outside = ((caption_video < 0) | (caption_video >= videos)).nonzero()
    if len(outside):
        caption = int(outside[0, 0])
        raise ValueError(
            f"caption_video[{caption}] is {int(caption_video[caption])}; this rank has"
            f" {videos} videos, so allowed are 0 to {videos - 1}"
        )
