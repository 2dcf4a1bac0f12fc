"""Evaluates retrieval on a whole test set: every caption against every video, both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvr.data_prep.records import Batch, Replacement, TooManyBadSamples
from tvr.kernels.ranking import ranks, retrieval_metrics
from tvr.trainer.config import Config, ModelConfig
from tvr.trainer.data import ordered_batches
from tvr.trainer.distributed.collectives import all_gather_rows
from tvr.trainer.distributed.world import World
from tvr.trainer.loss.gradient_cache import concat_features
from tvr.trainer.loss.objective import all_gather_videos, similarity_rows
from tvr.trainer.model.model import Features, model_inputs
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.records import Evaluation

Encode = Callable[..., Features]
TOP_VIDEOS = 5
"""Number of videos that are stored for each query."""


@dataclass(frozen=True, slots=True)
class _EncodedSet:
    """The features of this rank's slice of a test set."""

    features: Features
    keys: list[str]
    captions: list[str]
    caption_video: Tensor
    """(captions,): the row in `keys` of each caption's video."""
    left_out: list[Replacement]


def evaluate(encode: Encode, config: Config, tokenizer: Tokenizer, world: World) -> Evaluation:
    """Ranks all captions and videos of `data.test` against each other.

    Each rank encodes its slice of the set once. All ranks call it and get the same result.

    Args:
        encode: The model's forward in evaluation mode. With partitioned weights (ZeRO-3) it is a
            collective, so all ranks call it equally often.

    Raises:
        ValueError: `data.test` is not set, the set has fewer readable videos than ranks, or
            `data.test_exchanged` shares no readable key with it.
        TooManyBadSamples: more samples than `data.max_bad` are unreadable.
    """
    if config.data.test is None:
        raise ValueError("data.test is not set: there is nothing to evaluate on")
    own = _encode_set(encode, config.data.test, config, tokenizer, world)
    similarity = _similarity_matrix(own, config.model, world)
    binding_accuracy, missing = _binding_accuracy(encode, own, config, tokenizer, world)
    parts = world.all_gather_objects((own.keys, own.captions, [*own.left_out, *missing]))
    keys = [key for part, _, _ in parts for key in part]
    captions = [caption for _, part, _ in parts for caption in part]
    first_row = sum(len(part) for part, _, _ in parts[: world.rank])
    text_video = _gather(own.caption_video + first_row, world)
    return Evaluation(
        data=config.data.test,
        videos=len(keys),
        captions=len(captions),
        left_out=tuple(entry for _, _, part in parts for entry in part),
        metrics=retrieval_metrics(similarity, text_video),
        binding_accuracy=binding_accuracy,
        queries=_query_results(similarity, text_video, keys, captions),
    )


def _encode_set(
    encode: Encode, url: str, config: Config, tokenizer: Tokenizer, world: World
) -> _EncodedSet:
    batches = ordered_batches(url, config.data, config.model, config.train, tokenizer, world)
    parts: list[Features] = []
    keys: list[str] = []
    captions: list[str] = []
    caption_video: list[Tensor] = []
    left_out: list[Replacement] = []
    with torch.no_grad():
        for batch, is_new in _equally_many(batches, url, world):
            features = encode(*model_inputs(batch, world.device))
            if not is_new:
                continue
            parts.append(features)
            caption_video.append(batch.caption_video + len(keys))
            keys.extend(batch.keys)
            captions.extend(batch.captions)
            left_out.extend(batch.replaced)
    return _EncodedSet(concat_features(parts), keys, captions, torch.cat(caption_video), left_out)


def _equally_many(batches: Iterator[Batch], url: str, world: World) -> Iterator[tuple[Batch, bool]]:
    """Yields equally many batches on every rank: (batch, True) for each of this rank's batches.

    While other ranks have more, it yields the last batch again, with False.
    """
    batch, at_end = _next_batch(batches, world)
    if any(at_end) or batch is None:
        raise ValueError(f"{url} has too few readable videos for {world.world_size} ranks")
    is_new = True
    while not all(at_end):
        yield batch, is_new
        following, at_end = _next_batch(batches, world)
        batch, is_new = (batch, False) if following is None else (following, True)


def _next_batch(batches: Iterator[Batch], world: World) -> tuple[Batch | None, tuple[int, ...]]:
    """This rank's next batch (None after its last one), and which ranks have no more."""
    batch = world.run_on_all(lambda: next(batches, None), TooManyBadSamples)
    return batch, world.all_gather_counts(batch is None)


def _similarity_matrix(own: _EncodedSet, model: ModelConfig, world: World) -> Tensor:
    """(captions, videos) similarity of the whole set; each rank computes its captions' rows."""
    features = own.features
    videos = all_gather_videos(features, world, world.all_gather_counts(len(features.frames)))
    with torch.no_grad():
        rows = similarity_rows(features, videos, model)
    return _gather(rows, world).cpu()


def _gather(own: Tensor, world: World) -> Tensor:
    """All ranks' rows, in rank order; ranks may have different numbers of rows."""
    return all_gather_rows(own, world, world.all_gather_counts(len(own)))


def _binding_accuracy(
    encode: Encode, own: _EncodedSet, config: Config, tokenizer: Tokenizer, world: World
) -> tuple[float | None, list[Replacement]]:
    """The binding accuracy, and the unreadable counterparts.

    It covers the captions whose own clip and counterpart are both readable.
    """
    url = config.data.test_exchanged
    if url is None:
        return None, []
    other = _encode_set(encode, url, config, tokenizer, world)
    row_of = {key: row for row, key in enumerate(other.keys)}
    pairs = [
        (caption, video, row_of[own.keys[video]])
        for caption, video in enumerate(own.caption_video.tolist())
        if own.keys[video] in row_of
    ]
    caption, video, counterpart = torch.tensor(pairs, dtype=torch.long).view(-1, 3).unbind(1)
    with torch.no_grad():
        matched = similarity_rows(own.features, own.features, config.model).cpu()[caption, video]
        exchanged = similarity_rows(own.features, other.features, config.model).cpu()
    exchanged = exchanged[caption, counterpart]
    # A tie counts half, as a guess would.
    wins = _gather((matched > exchanged).double() + (matched == exchanged) / 2, world)
    if not len(wins):
        raise ValueError(f"{url} shares no readable key with {config.data.test}")
    return float(100 * wins.mean()), other.left_out


def _query_results(
    similarity: Tensor, text_video: Tensor, keys: list[str], captions: list[str]
) -> list[dict[str, Any]]:
    """Rank and best videos of each caption, as evaluation.json stores them."""
    found_ranks = ranks(similarity, text_video).text_to_video.tolist()
    best = similarity.topk(min(TOP_VIDEOS, similarity.shape[1]), dim=1)
    return [
        {
            "caption": captions[row],
            "key": keys[int(text_video[row])],
            "rank": found_ranks[row],
            "top": [
                {"key": keys[column], "similarity": value}
                for column, value in zip(columns, values, strict=True)
            ],
        }
        for row, (columns, values) in enumerate(
            zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
    ]
