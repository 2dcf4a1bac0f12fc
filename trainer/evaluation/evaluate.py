"""Evaluates retrieval on a whole test set: every caption against every video, both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tvr.data_prep.records import Batch, Caption, Replacement, TooManyBadSamples
from tvr.kernels.ranking import TIE_TOLERANCE
from tvr.trainer.config import Config
from tvr.trainer.data import StoredTowers, ordered_batches
from tvr.trainer.distributed.collectives import all_gather_rows
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.protocol import (
    DEFAULTS,
    Bank,
    EvaluationOptions,
    Named,
    caption_ids,
    evaluation_of,
    rank_set,
)
from tvr.trainer.evaluation.retrieval import Score, paired_scores
from tvr.trainer.loss.gradient_cache import concat_features
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.model import Features, model_inputs
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.records import Evaluation

Encode = Callable[..., Features]
VIDEOS_PER_EXCHANGE = 256
"""Counterparts that all ranks hold at a time."""
Report = Callable[[int], None]
"""Takes the number of videos that this rank has encoded."""


@dataclass(frozen=True, slots=True)
class _EncodedSet:
    """The features of this rank's slice of a test set."""

    features: Features
    keys: list[str]
    captions: list[str]
    caption_video: Tensor
    """(captions,): the row in `keys` of each caption's video."""
    left_out: list[Replacement]


def evaluate(
    encode: Encode,
    config: Config,
    tokenizer: Tokenizer,
    world: World,
    options: EvaluationOptions = DEFAULTS,
    bank: Bank | None = None,
    report: Report | None = None,
    stored: StoredTowers | None = None,
) -> Evaluation:
    """Ranks all captions and videos of `data.test` against each other.

    Each rank encodes its slice of the set once, and holds no other rank's videos. All ranks call it
    and get the same result, except for the queries, which rank 0 alone has.

    Args:
        encode: The model's forward in evaluation mode. With partitioned weights (ZeRO-3) it is a
            collective, so all ranks call it equally often.
        bank: This rank's part of the bank that `options.qb_norm` names.
        report: Called after each batch of this rank.
        stored: Stored tower outputs of the test sets; `encode` then runs the heads alone.

    Raises:
        ValueError: `data.test` is not set, the set has fewer readable videos than ranks, or
            `data.test_exchanged` shares no readable key with it.
        TooManyBadSamples: more samples than `data.max_bad` are unreadable.
    """
    if config.data.test is None:
        raise ValueError("data.test is not set: there is nothing to evaluate on")
    if stored is not None and options.paragraphs:
        raise ValueError("--paragraphs joins captions, whose features are stored one by one")
    own = _encode_set(
        encode, config.data.test, config, tokenizer, world, options.paragraphs, report, stored
    )
    score = partial(similarity_rows, model=config.model)
    data, ids = config.data.test, caption_ids(own.captions)
    found, facts = rank_set(own.features, own.caption_video, ids, score, options, bank, data, world)
    binding_accuracy, missing = _binding_accuracy(
        encode, own, score, config, tokenizer, world, stored
    )
    left_out = world.all_gather_objects([*own.left_out, *missing])
    return evaluation_of(
        found,
        facts,
        Named(own.keys, own.captions, own.caption_video.tolist()),
        options,
        world,
        data=data,
        left_out=[entry for part in left_out for entry in part],
        binding_accuracy=binding_accuracy,
    )


def _encode_set(
    encode: Encode,
    url: str,
    config: Config,
    tokenizer: Tokenizer,
    world: World,
    paragraphs: bool = False,
    report: Report | None = None,
    stored: StoredTowers | None = None,
) -> _EncodedSet:
    data, model, train = config.data, config.model, config.train
    batches = ordered_batches(url, data, model, train, tokenizer, world, stored=stored)
    parts: list[Features] = []
    keys: list[str] = []
    captions: list[str] = []
    caption_video: list[Tensor] = []
    left_out: list[Replacement] = []
    with torch.no_grad():
        for batch, is_new in _equally_many(batches, url, world):
            if paragraphs:
                batch = _joined(batch, tokenizer)
            features = encode(*model_inputs(batch, world.device))
            if not is_new:
                continue
            parts.append(features)
            caption_video.append(batch.caption_video + len(keys))
            keys.extend(batch.keys)
            captions.extend(batch.captions)
            left_out.extend(batch.replaced)
            if report is not None:
                report(len(keys))
    return _EncodedSet(concat_features(parts), keys, captions, torch.cat(caption_video), left_out)


def _joined(batch: Batch, tokenizer: Tokenizer) -> Batch:
    """The batch with the captions of each video joined to one, in their order."""
    texts: dict[int, list[str]] = {}
    for text, video in zip(batch.captions, batch.caption_video.tolist(), strict=True):
        texts.setdefault(video, []).append(text)
    captions = tuple(" ".join(parts) for parts in texts.values())
    ids, mask = tokenizer([Caption(text=text) for text in captions])
    return replace(
        batch,
        captions=captions,
        caption_ids=caption_ids(captions),
        token_ids=ids,
        word_mask=mask,
        caption_video=torch.tensor(list(texts), dtype=torch.int64),
    )


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


def _binding_accuracy(
    encode: Encode,
    own: _EncodedSet,
    score: Score,
    config: Config,
    tokenizer: Tokenizer,
    world: World,
    stored: StoredTowers | None,
) -> tuple[float | None, list[Replacement]]:
    """The binding accuracy, and the unreadable counterparts.

    It covers the captions whose own clip and counterpart are both readable.
    """
    url = config.data.test_exchanged
    if url is None:
        return None, []
    other = _encode_set(encode, url, config, tokenizer, world, stored=stored)
    counterparts, row_of = _counterparts(own.keys, other, world)
    pairs = [
        (caption, video, row_of[own.keys[video]])
        for caption, video in enumerate(own.caption_video.tolist())
        if own.keys[video] in row_of
    ]
    caption, video, counterpart = torch.tensor(pairs, dtype=torch.long).view(-1, 3).unbind(1)
    with torch.no_grad():
        matched, exchanged = (
            paired_scores(own.features, videos, caption, row, score, world.device)
            for videos, row in ((own.features, video), (counterparts, counterpart))
        )
    lead = matched - exchanged
    # A tie counts half, as a guess would.
    wins = (lead > TIE_TOLERANCE).double() + (lead.abs() <= TIE_TOLERANCE) / 2
    wins = all_gather_rows(wins, world, world.all_gather_counts(len(wins)))
    if not len(wins):
        raise ValueError(f"{url} shares no readable key with {config.data.test}")
    return float(100 * wins.mean()), other.left_out


def _counterparts(
    keys: Sequence[str], other: _EncodedSet, world: World
) -> tuple[Features, dict[str, int]]:
    """The counterparts of this rank's videos, whichever rank encoded them, and their rows by key.

    Sets of unequal size are divided differently among the ranks, so that a clip and its counterpart
    may lie on two of them.
    """
    wanted = set(keys)
    features, row_of = other.features, {}
    columns = [features.frames, features.frame_mask]
    columns += [] if features.frame_logits is None else [features.frame_logits]
    found: list[list[Tensor]] = [[] for _ in columns]
    for rank, names in enumerate(world.all_gather_objects(other.keys)):
        for start in range(0, len(names), VIDEOS_PER_EXCHANGE):
            piece = names[start : start + VIDEOS_PER_EXCHANGE]
            counts = tuple(len(piece) if each == rank else 0 for each in range(world.world_size))
            sent = slice(start, start + counts[world.rank])
            kept = torch.tensor([key in wanted for key in piece], device=world.device)
            for parts, column in zip(found, columns, strict=True):
                parts.append(all_gather_rows(column[sent], world, counts)[kept])
            for key in piece:
                if key in wanted:
                    row_of[key] = len(row_of)
    frames, mask, *logits = (torch.cat(parts) for parts in found)
    return (
        features._replace(
            frames=frames, frame_mask=mask, frame_logits=logits[0] if logits else None
        ),
        row_of,
    )
