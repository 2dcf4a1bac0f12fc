"""The bank of QB-Norm: training captions, and never one of the test set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tvr.data_prep.budget import BadSampleBudget
from tvr.data_prep.dataset.sample_codec import parse_meta
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import BadSample, Caption, TooManyBadSamples, hash_caption
from tvr.trainer.config import Config
from tvr.trainer.distributed.collectives import all_gather_rows
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.options import EQUALITY
from tvr.trainer.features.feature_set import FeatureHeader, FeatureSet
from tvr.trainer.loss.gradient_cache import concat_features
from tvr.trainer.model.model import Features
from tvr.trainer.model.tokenizer import Tokenizer

CAPTIONS_PER_BATCH = 256

EncodeTexts = Callable[[Tensor, Tensor], Features]
"""Features of captions, from token ids and word mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """Captions of the bank that this rank gives."""

    name: str
    features: Features
    captions: Sequence[str]
    dropped: int = 0
    """Captions of all ranks that were dropped because the test set has them."""


def caption_ids(captions: Sequence[str]) -> Tensor:
    """(A,) numbers that are equal for equal captions."""
    return torch.tensor([hash_caption(text) for text in captions], dtype=torch.int64)


def stored_bank(stored: FeatureSet, tested: FeatureHeader, limit: int | None, world: World) -> Bank:
    """The bank of a feature set of the same model.

    Args:
        tested: Header of the features that are evaluated.
        limit: Largest number of captions; None: all.

    Raises:
        ValueError: the features are of another model or of other settings, or hold no captions.
    """
    if stored.info.fingerprint != tested.fingerprint:
        raise ValueError(
            f"the bank {stored.folder} holds features of another model or of other settings,"
            f" {stored.info.model}, than those that are evaluated, {tested.model}"
        )
    chosen = _own(_spread(stored.num_captions, limit), world, str(stored.folder))
    captions = [stored.captions[int(row)] for row in chosen]
    return Bank(name=str(stored.folder), features=stored.texts(chosen), captions=captions)


def encoded_bank(
    url: str,
    encode: EncodeTexts,
    tokenizer: Tokenizer,
    config: Config,
    limit: int | None,
    world: World,
) -> Bank:
    """The bank of a packed data set, whose captions are encoded.

    Args:
        encode: The model's text tower; each rank calls it as often as it needs.
        limit: Largest number of captions; None: all.

    Raises:
        ValueError: the set cannot be opened.
        TooManyBadSamples: more than `data.max_bad` samples cannot be read.
    """
    reader = SampleReader(url, num_frames=1, image_size=1)
    ends = np.cumsum(np.asarray(reader.manifest.samples.num_captions, dtype=np.int64))
    chosen = _own(_spread(int(ends[-1]) if len(ends) else 0, limit), world, url)
    # On every rank at once: the others would wait for a rank that leaves alone.
    captions = world.run_on_all(
        lambda: _read(reader, url, ends, chosen, config.data.max_bad), TooManyBadSamples
    )
    with torch.no_grad():
        parts = [
            encode(
                *(
                    x.to(world.device)
                    for x in tokenizer(captions[start : start + CAPTIONS_PER_BATCH])
                )
            )
            for start in range(0, len(captions), CAPTIONS_PER_BATCH)
        ]
        if not parts:  # as wide as those of other ranks
            probe = encode(*(x.to(world.device) for x in tokenizer([Caption(text="a", words=())])))
            parts = [_rows(probe, torch.zeros(0, dtype=torch.int64))]
    features = concat_features(parts)
    return Bank(name=url, features=features, captions=[caption.text for caption in captions])


def _read(
    reader: SampleReader, url: str, ends: np.ndarray, chosen: np.ndarray, max_bad: int
) -> list[Caption]:
    """Captions by their numbers; `ends` are the numbers of captions up to each sample."""
    captions: list[Caption] = []
    budget = BadSampleBudget(max_bad, f"while reading the bank {url}")
    rows = np.searchsorted(ends, chosen, side="right")
    for row in np.unique(rows).tolist():
        try:
            found = parse_meta(reader.key(row), reader.members(row)).captions
        except BadSample as bad:
            budget.record_bad(bad.key, bad.reason, bad.detail)
            continue
        budget.record_good()
        first = int(ends[row]) - len(found)
        captions += [found[number - first] for number in chosen[rows == row].tolist()]
    return captions


def without_test_captions(
    bank: Bank, test_ids: Tensor, data: str, drop: bool, world: World
) -> Bank:
    """Makes sure that the bank holds no caption of the test set. All ranks call it.

    Args:
        test_ids: `caption_ids` of this rank's captions of the test set.
        data: Name of the test set.
        drop: Drop such captions instead of refusing them.

    Raises:
        ValueError: the bank holds captions of the test set, or has not one text for each caption.
    """
    # On every rank at once: the others would wait for a rank that leaves alone.
    world.run_on_all(lambda: _check_texts(bank), ValueError)
    counts = world.all_gather_counts(len(test_ids))
    tested = all_gather_rows(test_ids.to(world.device), world, counts).cpu()
    shared = torch.isin(caption_ids(bank.captions), tested)
    found = [bank.captions[row] for row in shared.nonzero().squeeze(1).tolist()]
    number = sum(world.all_gather_counts(len(found)))
    if not number:
        return bank
    if not drop:
        first = next(text for text in world.all_gather_objects(found[:1]) if text)[0]
        raise ValueError(
            f"the bank {bank.name} holds {number} captions of the test set {data}, such as"
            f" {first!r}. QB-Norm must not see test captions ({EQUALITY}). Give another bank, or"
            " drop these captions with --bank-shared drop"
        )
    kept = (~shared).nonzero().squeeze(1)
    return replace(
        bank,
        features=_rows(bank.features, kept),
        captions=[bank.captions[row] for row in kept.tolist()],
        dropped=number,
    )


def _check_texts(bank: Bank) -> None:
    if len(bank.captions) != len(bank.features.sentence):
        raise ValueError(
            f"the bank {bank.name} has {len(bank.captions)} texts for"
            f" {len(bank.features.sentence)} captions; each needs one, or a test caption could hide"
        )


def _spread(total: int, limit: int | None) -> np.ndarray:
    """Numbers of at most `limit` captions of `total`, evenly spread."""
    count = total if limit is None else min(total, limit)
    return np.arange(count, dtype=np.int64) * total // max(1, count)


def _own(chosen: np.ndarray, world: World, name: str) -> np.ndarray:
    """This rank's share."""
    if not len(chosen):
        raise ValueError(f"the bank {name} holds no captions")
    first, end = (len(chosen) * r // world.world_size for r in (world.rank, world.rank + 1))
    return chosen[first:end]


def _rows(texts: Features, rows: Tensor) -> Features:
    logits = texts.word_logits
    rows = rows.to(texts.sentence.device)
    return texts._replace(
        sentence=texts.sentence[rows],
        words=texts.words[rows],
        word_mask=texts.word_mask[rows],
        word_logits=None if logits is None else logits[rows],
    )
