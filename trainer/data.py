"""Data sets, tokeniser and batches of a run, as its settings name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tvr.data_prep.dataset.manifest import check_words, read_manifest
from tvr.data_prep.reading.augment import Augmentation
from tvr.data_prep.reading.loader import evaluation_batches, train_batches
from tvr.data_prep.reading.node_cache import CacheFolder
from tvr.data_prep.records import Batch
from tvr.trainer.config import DataConfig, ModelConfig, TrainConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.model.batch_copies import pin_pages
from tvr.trainer.model.model import image_size, tokenizer_folder
from tvr.trainer.model.tokenizer import Tokenizer, load_tokenizer


def validate_data_sets(data: DataConfig, train: TrainConfig, world: World) -> int:
    """Reads the manifest of every data set and checks it against the settings.

    Returns:
        The number of training samples.

    Raises:
        ValueError: a data set is too small for the batch or the ranks, the two test sets hold
            different keys, or a set lacks the words that `data.content_words` needs.
        OSError, ShardCorrupt: a manifest is missing or damaged.
    """
    train_set = read_manifest(data.train, node_folder=data.shard_cache)
    if train_set.num_samples < train.global_batch:
        raise ValueError(
            f"{data.train} holds {train_set.num_samples} samples, fewer than train.global_batch="
            f"{train.global_batch}: a batch would hold some of them twice"
        )
    sets = [(data.train, train_set)]
    if data.test is not None:
        test = read_manifest(data.test, node_folder=data.shard_cache)
        sets.append((data.test, test))
        if test.num_samples < world.world_size:
            raise ValueError(
                f"{data.test} holds {test.num_samples} videos: too few for {world.world_size} ranks"
            )
        if data.test_exchanged is not None:
            exchanged = read_manifest(data.test_exchanged, node_folder=data.shard_cache)
            sets.append((data.test_exchanged, exchanged))
            if list(test.samples.key) != list(exchanged.samples.key):
                raise ValueError(
                    f"data.test_exchanged={data.test_exchanged} must hold the same keys in the "
                    f"same order as data.test={data.test}"
                )
    if data.content_words:
        for url, manifest in sets:
            check_words(url, manifest, needed_by="data.content_words")
    return train_set.num_samples


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
) -> Iterator[Batch]:
    """Yields this rank's micro-batches for training, without end.

    Args:
        start_step: Optimiser steps already done; their samples are skipped.
        known_bad: Keys of bad samples found before, on any rank, with their reasons.

    Raises:
        ValueError, OSError, TooManyBadSamples: as `train_batches`.
    """
    return train_batches(
        data.train,
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
        word_drop=data.word_drop,
        cache_bytes=data.cache_mib << 20,
        shard_cache=_shard_cache(data),
        pin=pin_pages if world.device.type == "cuda" else None,
    )


def ordered_batches(
    url: str,
    data: DataConfig,
    model: ModelConfig,
    train: TrainConfig,
    tokenizer: Tokenizer,
    world: World,
) -> Iterator[Batch]:
    """Yields this rank's share of a whole data set, in order.

    Args:
        url: The data set, for example `data.test`.

    Raises:
        ValueError, OSError, TooManyBadSamples: as `evaluation_batches`.
    """
    return evaluation_batches(
        url,
        micro_batch=train.micro_batch,
        rank=world.rank,
        world_size=world.world_size,
        workers=data.workers,
        num_frames=data.num_frames,
        image_size=image_size(model),
        tokenize=tokenizer,
        max_bad=data.max_bad,
        max_bad_in_a_row=data.max_bad_in_a_row,
        max_unavailable_in_a_row=data.max_unavailable_in_a_row,
        decoder=data.decoder,
        shard_cache=_shard_cache(data),
    )


def _shard_cache(data: DataConfig) -> CacheFolder | None:
    """Returns the node's cache of remote shards, or None if it is off."""
    if data.shard_cache is None:
        return None
    return CacheFolder(path=data.shard_cache, max_bytes=data.shard_cache_gib << 30)


def _augmentation(data: DataConfig) -> Augmentation:
    """Returns the random augmentation of training samples."""
    return Augmentation(frame_sampling=data.frame_sampling, crop_scale=data.crop_scale)
