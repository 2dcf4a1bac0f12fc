"""How a test set is evaluated, and the record of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tvr.data_prep.records import Replacement, hash_caption
from tvr.trainer.comparison.statistics import Interval, intervals
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.retrieval import Retrieval
from tvr.trainer.records import Evaluation

VERSION = 2
"""Version of the protocols; 1 had recall up to 10 and knew no equal captions."""
EQUALITY = "case, accents' encoding, white space and sentence marks at the end do not count"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """The choices of an evaluation. The defaults are those of the published tables."""

    equal_captions: bool = False
    """True: the videos of equal captions (`normal_caption`) are right for all of these captions.
    False: only a caption's own video is right."""
    paragraphs: bool = False
    """True: the captions of a video are joined, in their order, to one query."""
    top_videos: int = 5
    """Best videos that are stored for each query."""


DEFAULTS = EvaluationOptions()


class Named(NamedTuple):
    """Names of this rank's videos and captions."""

    keys: Sequence[str]
    captions: Sequence[str]
    caption_video: list[int]
    """Each caption's video among the rank's own."""


def caption_ids(captions: Sequence[str]) -> Tensor:
    """(A,) numbers that are equal for equal captions."""
    return torch.tensor([hash_caption(text) for text in captions], dtype=torch.int64)


def evaluation_of(
    found: Retrieval,
    own: Named,
    options: EvaluationOptions,
    world: World,
    *,
    data: str,
    left_out: Sequence[Replacement],
    binding_accuracy: float | None = None,
    model: str | None = None,
) -> Evaluation:
    """The record of an evaluation. All ranks call it; rank 0 alone gets the queries.

    Args:
        own: Names of the rank's videos and captions.
        left_out: Unreadable samples of all ranks.
    """
    names = world.gather_objects_to_first(own)
    queries = [] if names is None else _queries(found, names)
    video_queries = [] if names is None else _video_queries(found, names)
    return Evaluation(
        data=data,
        videos=sum(world.all_gather_counts(len(own.keys))),
        captions=len(found.ranks.text_to_video),
        left_out=tuple(left_out),
        metrics=found.ranks.metrics(),
        binding_accuracy=binding_accuracy,
        queries=queries,
        video_queries=video_queries,
        intervals=_intervals({"text_to_video": queries, "video_to_text": video_queries}),
        protocol=_protocol(found, options),
        model=model,
    )


def _protocol(found: Retrieval, options: EvaluationOptions) -> dict[str, Any]:
    captions, videos = len(found.ranks.text_to_video), len(found.ranks.videos)
    name = "multi_caption" if captions > videos else "single_caption"
    return {
        "name": "paragraph" if options.paragraphs else name,
        "version": VERSION,
        "equal_captions": "right" if options.equal_captions else "wrong",
        "captions_with_equals": found.equal_captions,
        "equality": EQUALITY,
        "ties": "against the query",
    }


def _intervals(
    directions: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, dict[str, Interval]]:
    """Of each direction that has queries, on rank 0; captions of a video are drawn together."""
    return {
        direction: intervals([one["rank"] for one in rows], [one["key"] for one in rows])
        for direction, rows in directions.items()
        if rows
    }


def _queries(found: Retrieval, names: Sequence[Named]) -> list[dict[str, Any]]:
    """Rank and best videos of each caption, as evaluation.json stores them."""
    keys = [key for part in names for key in part.keys]
    own_keys = [part.keys[video] for part in names for video in part.caption_video]
    captions = [caption for part in names for caption in part.captions]
    rows = zip(
        captions,
        own_keys,
        found.ranks.text_to_video.tolist(),
        found.top_videos.tolist(),
        found.top_scores.tolist(),
        strict=True,
    )
    return [
        {
            "caption": caption,
            "key": key,
            "rank": rank,
            "top": [
                {"key": keys[video], "similarity": value}
                for video, value in zip(videos, values, strict=True)
            ],
        }
        for caption, key, rank, videos, values in rows
    ]


def _video_queries(found: Retrieval, names: Sequence[Named]) -> list[dict[str, Any]]:
    """Rank of each video's best caption."""
    keys = [key for part in names for key in part.keys]
    rows = zip(found.ranks.videos.tolist(), found.ranks.video_to_text.tolist(), strict=True)
    return [{"key": keys[video], "rank": rank} for video, rank in rows]
