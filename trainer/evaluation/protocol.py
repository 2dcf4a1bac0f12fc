"""How a test set is evaluated, and the record of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor

from tvr.data_prep.records import Replacement
from tvr.kernels.ranking import RetrievalMetrics
from tvr.trainer.comparison.statistics import Interval, intervals
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.bank import Bank, caption_ids, without_test_captions
from tvr.trainer.evaluation.options import DEFAULTS, EQUALITY, EvaluationOptions
from tvr.trainer.evaluation.retrieval import Rescoring, Retrieval, Score, rank_features
from tvr.trainer.model.model import Features
from tvr.trainer.records import Evaluation

__all__ = [
    "DEFAULTS",
    "Bank",
    "EvaluationOptions",
    "Named",
    "caption_ids",
    "evaluation_of",
    "rank_set",
]

VERSION = 2
"""Version of the protocols; 1 had recall up to 10 and knew no equal captions."""


class Named(NamedTuple):
    """Names of this rank's videos and captions."""

    keys: Sequence[str]
    captions: Sequence[str]
    caption_video: list[int]
    """Each caption's video among the rank's own."""


def rank_set(
    features: Features,
    caption_video: Tensor,
    ids: Tensor | None,
    score: Score,
    options: EvaluationOptions,
    bank: Bank | None,
    data: str,
    world: World,
) -> tuple[Retrieval, dict[str, Any]]:
    """Ranks a test set as the options say. All ranks call it.

    Args:
        features: Features of this rank's captions and videos.
        caption_video: (A,) row of each caption's video.
        ids: `caption_ids` of the rank's captions; None: their texts are not known.
        bank: The rank's part of the bank that `options.qb_norm` names.
        data: Name of the test set.

    Returns:
        The ranks, and the facts of the bank.

    Raises:
        ValueError: an option lacks what it needs, or the bank holds captions of the test set.
    """
    if (bank is None) != (options.qb_norm is None):
        raise ValueError("QB-Norm needs both: options.qb_norm and its bank")
    facts: dict[str, Any] = {}
    if bank is not None:
        if ids is None:
            raise ValueError(
                "qb_norm needs the texts of the test captions: the bank must hold none of them"
            )
        bank = without_test_captions(bank, ids, data, options.bank_shared == "drop", world)
        facts = {"bank": bank.name, "dropped_test_captions": bank.dropped}
    rescoring = None
    if bank is not None or options.dual_softmax is not None:
        rescoring = Rescoring(
            temperature=options.dual_softmax,
            bank=None if bank is None else bank.features,
            beta=options.beta,
        )
    found = rank_features(
        features,
        caption_video,
        score,
        world,
        caption_ids=ids,
        merge_equal=options.equal_captions,
        rescoring=rescoring,
        top_videos=options.top_videos,
    )
    return found, facts


def evaluation_of(
    found: Retrieval,
    bank_facts: Mapping[str, Any],
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
        found: The ranks, and `bank_facts`, from `rank_set`.
        own: Names of the rank's videos and captions.
        left_out: Unreadable samples of all ranks.
    """
    names = world.gather_objects_to_first(own)
    queries = [] if names is None else _queries(found, names, options.equal_captions)
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
        rescored=_rescored(found, bank_facts, options),
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


def _rescored(
    found: Retrieval, bank_facts: Mapping[str, Any], options: EvaluationOptions
) -> dict[str, Any]:
    """The blocks of metrics beside the raw one, each with its settings."""
    blocks: dict[str, Any] = {}
    for name, ranks in found.rescored.items():
        if name == "dual_softmax":
            settings: dict[str, Any] = {"temperature": options.dual_softmax}
        else:
            settings = {"beta": options.beta, **bank_facts, **ranks.facts}
        texts = ranks.text_to_video.metrics()
        blocks[name] = settings | {"text_to_video": asdict(texts)}
        if ranks.video_to_text is not None:
            both = RetrievalMetrics(texts, ranks.video_to_text.metrics())
            blocks[name] |= {"video_to_text": asdict(both.video_to_text), "mean": both.mean}
    return blocks


def _queries(found: Retrieval, names: Sequence[Named], merge_equal: bool) -> list[dict[str, Any]]:
    """Rank and best videos of each caption, as evaluation.json stores them.

    Args:
        merge_equal: A caption with several right videos also gets "keys", all of them.
    """
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
    queries: list[dict[str, Any]] = [
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
    if merge_equal:
        right: dict[int, dict[str, None]] = {}
        ids = caption_ids(captions).tolist()
        for number, key in zip(ids, own_keys, strict=True):
            right.setdefault(number, {})[key] = None
        for query, number in zip(queries, ids, strict=True):
            if len(right[number]) > 1:
                query["keys"] = list(right[number])
    _add_ranks(queries, {name: ranks.text_to_video.rank for name, ranks in found.rescored.items()})
    return queries


def _video_queries(found: Retrieval, names: Sequence[Named]) -> list[dict[str, Any]]:
    """Rank of each video's best caption."""
    keys = [key for part in names for key in part.keys]
    rows = zip(found.ranks.videos.tolist(), found.ranks.video_to_text.tolist(), strict=True)
    queries: list[dict[str, Any]] = [{"key": keys[video], "rank": rank} for video, rank in rows]
    of_videos = {name: ranks.video_to_text for name, ranks in found.rescored.items()}
    _add_ranks(queries, {name: ranks.rank for name, ranks in of_videos.items() if ranks})
    return queries


def _add_ranks(queries: list[dict[str, Any]], rescored: Mapping[str, Tensor]) -> None:
    for name, ranks in rescored.items():
        for query, rank in zip(queries, ranks.tolist(), strict=True):
            query.setdefault("rescored_ranks", {})[name] = rank
