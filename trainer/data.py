"""Data sets, tokeniser and batches of a run, as its settings name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import ceil
from typing import NamedTuple, TypeAlias

from tvr.data_prep.dataset.manifest import Manifest, check_words, read_manifest
from tvr.data_prep.mixture import BLOCK, Mixture
from tvr.data_prep.reading.augment import Augmentation
from tvr.data_prep.reading.loader import evaluation_batches, train_batches
from tvr.data_prep.reading.locality import (
    NOTHING_NEEDED,
    CacheNeed,
    RankShare,
    evaluation_need,
    training_need,
)
from tvr.data_prep.reading.mixed_sets import NO_REGROUP, set_order
from tvr.data_prep.reading.node_cache import CacheFolder
from tvr.data_prep.reading.order import Regroup, window_shards
from tvr.data_prep.records import Batch, TrainingSet
from tvr.data_prep.storage.storage import Storage
from tvr.data_prep.stored.tower_outputs import TowerOutputs
from tvr.trainer.config import DataConfig, ModelConfig, TrainConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.model.batch_copies import pin_pages
from tvr.trainer.model.model import image_size, tokenizer_folder
from tvr.trainer.model.tokenizer import Tokenizer, load_tokenizer

StoredTowers: TypeAlias = Mapping[str, TowerOutputs]
"""Stored outputs of frozen towers by the URL of their data set."""


class DataSets(NamedTuple):
    """What the data sets of a run hold."""

    num_samples: dict[str, int]
    """Samples of each training set by its name, which is empty for `data.train`."""
    contents: dict[str, str]
    """Digest of each data set (`Manifest.content`), by the setting that names it."""


def training_sets(data: DataConfig) -> tuple[TrainingSet, ...]:
    """The sets that a run trains on; the set of `data.train` has no name."""
    if data.train is not None:
        return (TrainingSet(url=data.train, max_bad=data.max_bad),)
    return tuple(
        TrainingSet(
            name=name,
            url=each.url,
            weight=each.weight,
            max_bad=data.max_bad if each.max_bad is None else each.max_bad,
        )
        for name, each in sorted(data.train_sets.items())
    )


def training_set_sizes(data: DataConfig) -> dict[str, int]:
    """Returns the number of samples of each training set by its name; raises as `read_manifest`."""
    return {
        each.name: read_manifest(each.url, node_folder=data.shard_cache).num_samples
        for each in training_sets(data)
    }


def training_mixture(data: DataConfig, train: TrainConfig) -> Mixture | None:
    """The mixture of `data.train_sets`; None for a run with `data.train`."""
    if not data.train_sets:
        return None
    return Mixture({name: each.weight for name, each in data.train_sets.items()}, train.seed)


def mixture_line(data: DataConfig, train: TrainConfig) -> str:
    """One line with the resolved share of each training set."""
    mixture = training_mixture(data, train)
    if mixture is None:
        return f"training set: {data.train}"
    shares = [
        f"{name} {quota:,} ({quota / BLOCK:.2%}) from {data.train_sets[name].url}"
        for name, quota in zip(mixture.names, mixture.quotas, strict=True)
    ]
    return f"training sets, pairs of every {BLOCK:,}: {'; '.join(shares)}"


def order_line(data: DataConfig, train: TrainConfig) -> str:
    """One line with the shards that are read together."""
    mixture = training_mixture(data, train)
    parts = {"": 1.0} if mixture is None else dict(zip(mixture.names, mixture.shares, strict=True))
    windows = [
        f"{name}{': ' if name else ''}{window_shards(ceil(train.global_batch * part), 1 << 40)}"
        for name, part in parts.items()
    ]
    return f"sample order: windows of about {', '.join(windows)} shards, or all of a smaller set"


def validate_data_sets(data: DataConfig, train: TrainConfig, world: World) -> DataSets:
    """Reads the manifest of every data set and checks it against the settings.

    Raises:
        ValueError: a data set is too small for the batch or the ranks, the two test sets hold
            different keys, a set lacks the words that `data.content_words` or `data.word_drop`
            needs, a training set cannot be mixed with others, or `data.shard_cache` is too small.
        OSError, ShardCorrupt: a manifest is missing or damaged.
    """
    training = {
        each.name: (each.url, read_manifest(each.url, node_folder=data.shard_cache))
        for each in training_sets(data)
    }
    if data.train_sets:
        check_mixed_sets({name: found for name, (_, found) in training.items()}, data, train)
    else:
        (_, train_set) = training[""]
        if train_set.num_samples < train.global_batch:
            raise ValueError(
                f"{data.train} holds {train_set.num_samples} samples, fewer than"
                f" train.global_batch={train.global_batch}: a batch would hold some of them twice"
            )
    if data.word_drop:
        for url, manifest in training.values():
            check_words(url, manifest, needed_by="data.word_drop")
    contents = {
        f"data.train_sets.{name}.url" if name else "data.train": manifest.content
        for name, (_, manifest) in training.items()
    }
    sets = list(training.values())
    if data.test is not None:
        test = read_manifest(data.test, node_folder=data.shard_cache)
        sets.append((data.test, test))
        contents["data.test"] = test.content
        if test.num_samples < world.world_size:
            raise ValueError(
                f"{data.test} holds {test.num_samples} videos: too few for {world.world_size} ranks"
            )
        if data.test_exchanged is not None:
            exchanged = read_manifest(data.test_exchanged, node_folder=data.shard_cache)
            sets.append((data.test_exchanged, exchanged))
            contents["data.test_exchanged"] = exchanged.content
            if list(test.samples.key) != list(exchanged.samples.key):
                raise ValueError(
                    f"data.test_exchanged={data.test_exchanged} must hold the same keys in the "
                    f"same order as data.test={data.test}"
                )
    if data.content_words:
        for url, manifest in sets:
            check_words(url, manifest, needed_by="data.content_words")
    folder = _shard_cache(data)
    if folder is not None:
        needs = [_training_need(data, train, world, training)]
        needs += [_test_need(data, train, world, *each) for each in sets[len(training) :]]
        folder.check(sum(needs, NOTHING_NEEDED))
    num_samples = {name: manifest.num_samples for name, (_, manifest) in training.items()}
    return DataSets(num_samples, contents)


def check_mixed_sets(sets: Mapping[str, Manifest], data: DataConfig, train: TrainConfig) -> None:
    """Checks several training sets, by their names, against their shares of a batch.

    Raises:
        ValueError: a set cannot be mixed with others, or is too small for its weight.
    """
    mixture = training_mixture(data, train)
    assert mixture is not None, "the caller has several sets"
    for name, share in zip(mixture.names, mixture.shares, strict=True):
        if name not in sets:
            continue
        manifest, pairs = sets[name], train.global_batch * share
        where = f"data.train_sets.{name}: {data.train_sets[name].url}"
        if manifest.beton is not None:
            raise ValueError(
                f"{where} is a beton, which cannot be mixed with other sets; give the shards that"
                " it was written from"
            )
        if manifest.num_samples < pairs:
            raise ValueError(
                f"{where} holds {manifest.num_samples} samples, fewer than its {pairs:,.1f} pairs"
                f" of a global batch ({share:.2%} of train.global_batch={train.global_batch}): a"
                " batch would hold some of them twice; lower its weight"
            )


def build_tokenizer(model: ModelConfig, data: DataConfig) -> Tokenizer:
    """Loads the tokeniser that `model.tokenizer` or `model.pretrained` names.

    Raises:
        ValueError: as `load_tokenizer` and `tokenizer_folder`.
    """
    return load_tokenizer(tokenizer_folder(model), data.max_words, content_words=data.content_words)


def training_batches(
    data: DataConfig,
    model: ModelConfig,
    train: TrainConfig,
    tokenizer: Tokenizer,
    world: World,
    *,
    start_step: int = 0,
    known_bad: Mapping[str, str] | None = None,
    stored: StoredTowers | None = None,
    regroup: Mapping[str, Regroup] = NO_REGROUP,
) -> Iterator[Batch]:
    """Yields this rank's micro-batches for training, without end.

    Args:
        start_step: Optimiser steps already done; their samples are skipped.
        known_bad: Keys of bad samples found before, on any rank, with their reasons.
        stored: Stored tower outputs by the URL of their data set, read in place of videos.
        regroup: Last step of each set's order, see `hard_batches.prepare_hard_batches`.

    Raises:
        ValueError, OSError, TooManyBadSamples: as `train_batches`.
    """
    sets = training_sets(data)
    return train_batches(
        sets[0].url if data.train is not None else sets,
        seed=train.seed,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        rank=world.rank,
        world_size=world.world_size,
        start_step=start_step,
        workers=data.workers,
        num_frames=data.num_frames,
        image_size=image_size(model),
        tokenize=tokenizer,
        max_bad=data.max_bad,
        max_bad_in_a_row=data.max_bad_in_a_row,
        max_unavailable_in_a_row=data.max_unavailable_in_a_row,
        known_bad=known_bad,
        augmentation=_augmentation(data),
        decoder=data.decoder,
        frame_spacing=data.frame_spacing,
        word_drop=data.word_drop,
        cache_bytes=data.cache_mib << 20,
        shard_cache=_training_cache(data, train, world),
        node=world.node,
        pin=pin_pages if world.device.type == "cuda" else None,
        outputs=None if stored is None else {each.name: stored[each.url] for each in sets},
        regroup=regroup,
    )


def ordered_batches(
    url: str,
    data: DataConfig,
    model: ModelConfig,
    train: TrainConfig,
    tokenizer: Tokenizer,
    world: World,
    *,
    stored: StoredTowers | None = None,
    block: tuple[int, int] | None = None,
) -> Iterator[Batch]:
    """Yields this rank's share of a whole data set, in order.

    Args:
        url: The data set, for example `data.test`.
        stored: As in `training_batches`.
        block: Number of a block and number of blocks: the block's share instead of this rank's,
            with batches of 0 rows, too, and at most one read in a row that fails for the moment.

    Raises:
        ValueError, OSError, TooManyBadSamples: as `evaluation_batches`.
    """
    rank, count = (world.rank, world.world_size) if block is None else block
    return evaluation_batches(
        url,
        micro_batch=train.micro_batch,
        rank=rank,
        world_size=count,
        workers=data.workers,
        num_frames=data.num_frames,
        image_size=image_size(model),
        tokenize=tokenizer,
        max_bad=data.max_bad,
        max_bad_in_a_row=data.max_bad_in_a_row,
        max_unavailable_in_a_row=data.max_unavailable_in_a_row if block is None else 1,
        decoder=data.decoder,
        frame_spacing=data.frame_spacing,
        shard_cache=_shard_cache(data),
        node=world.node if block is None else range(rank, rank + 1),
        outputs=None if stored is None else stored[url],
        keep_empty=block is not None,
    )


def _shard_cache(data: DataConfig) -> CacheFolder | None:
    """Returns the node's cache of remote shards, or None if it is off."""
    if data.shard_cache is None:
        return None
    return CacheFolder(path=data.shard_cache, max_bytes=data.shard_cache_gib << 30)


def _training_cache(data: DataConfig, train: TrainConfig, world: World) -> CacheFolder | None:
    """The node's cache for training, which leaves room for the test sets: their evaluations come
    while the training shards stay in use."""
    folder = _shard_cache(data)
    tests = [url for url in (data.test, data.test_exchanged) if url is not None]
    if folder is None or not tests:
        return folder
    needs = [
        _test_need(data, train, world, url, read_manifest(url, node_folder=data.shard_cache))
        for url in tests
    ]
    return replace(folder, others=sum(needs, NOTHING_NEEDED))


def _training_need(
    data: DataConfig, train: TrainConfig, world: World, sets: Mapping[str, tuple[str, Manifest]]
) -> CacheNeed:
    """What the training sets, by their names, need of the node's cache."""
    mixture, total = training_mixture(data, train), NOTHING_NEEDED
    for name, (url, manifest) in sets.items():
        if _is_cached(url, manifest):
            part = 1.0 if mixture is None else mixture.share_of(name)
            seed = train.seed if mixture is None else mixture.set_seed(mixture.names.index(name))
            order = set_order(manifest, seed, train.global_batch, part)
            share = _rank_share(train, world)
            total += training_need(manifest.shards, order, share, data.workers, part=part)
    return total


def _test_need(
    data: DataConfig, train: TrainConfig, world: World, url: str, manifest: Manifest
) -> CacheNeed:
    """What a test set needs of the node's cache."""
    if not _is_cached(url, manifest):
        return NOTHING_NEEDED
    return evaluation_need(manifest.shards, _rank_share(train, world), data.workers)


def _is_cached(url: str, manifest: Manifest) -> bool:
    return manifest.beton is None and not Storage(manifest.files_url(url)).is_local


def _rank_share(train: TrainConfig, world: World) -> RankShare:
    return RankShare(
        rank=world.rank,
        world_size=world.world_size,
        micro_batch=train.micro_batch,
        node=range(world.world_size) if world.node is None else world.node,
    )


def _augmentation(data: DataConfig) -> Augmentation:
    """Returns the random augmentation of training samples."""
    return Augmentation(frame_sampling=data.frame_sampling, crop_scale=data.crop_scale)
