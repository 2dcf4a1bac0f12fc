"""What a run reads by its settings: its tokeniser, and its batches of training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tvr.data_prep.records import Batch
from tvr.data_prep.stream import evaluation_batches, train_batches
from tvr.trainer.config import Config, shard_cache, views
from tvr.trainer.model import image_size, tokenizer_folder
from tvr.trainer.tokenizer import Tokenizer, load_tokenizer
from tvr.trainer.world import World


def tokenizer_of(config: Config) -> Tokenizer:
    """The tokeniser of the model's folder. Raises as `load_tokenizer` and `tokenizer_folder`."""
    return load_tokenizer(
        tokenizer_folder(config.model),
        config.data.max_words,
        content_words=config.data.content_words,
    )


def training_batches(
    config: Config,
    tokenizer: Tokenizer,
    world: World,
    *,
    start_step: int = 0,
    known_bad: Mapping[str, str] | None = None,
) -> Iterator[Batch]:
    """This rank's micro-batches from the one of step `start_step` on; `known_bad` were met before,
    on any rank. Raises as `train_batches`."""
    data, train = config.data, config.train
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
        image_size=image_size(config.model),
        tokenize=tokenizer,
        max_bad=data.max_bad,
        max_bad_in_a_row=data.max_bad_in_a_row,
        known_bad=known_bad,
        views=views(data),
        decoder=data.decoder,
        word_drop=data.word_drop,
        cache_bytes=data.cache_mib << 20,
        shard_cache=shard_cache(data),
    )


def batches_in_order(
    config: Config, tokenizer: Tokenizer, world: World, url: str
) -> Iterator[Batch]:
    """This rank's share of a whole data set, in order. Raises as `evaluation_batches`."""
    data = config.data
    return evaluation_batches(
        url,
        micro_batch=config.train.micro_batch,
        rank=world.rank,
        world_size=world.world_size,
        workers=data.workers,
        num_frames=data.num_frames,
        image_size=image_size(config.model),
        tokenize=tokenizer,
        max_bad=data.max_bad,
        max_bad_in_a_row=data.max_bad_in_a_row,
        decoder=data.decoder,
        shard_cache=shard_cache(data),
    )
