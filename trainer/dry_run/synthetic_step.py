"""One optimiser step of a configured model on random data, by the code of training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from tvr.data_prep.records import Batch
from tvr.trainer.config import Config, DataConfig, ModelConfig, TrainConfig
from tvr.trainer.distributed.world import join_world
from tvr.trainer.engine.engine import Engine
from tvr.trainer.fencing import begin_attempt
from tvr.trainer.model.features import stored_inputs
from tvr.trainer.model.model import TextVideoModel, build_model, image_size, model_inputs
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.monitoring.run_log import LogWriter
from tvr.trainer.monitoring.step_record import StepRecord
from tvr.trainer.train_step import TrainStep


def single_rank_config(config: Config, ranks: int) -> Config:
    """Returns a configuration in which a single rank does one rank's share of each step."""
    return replace(
        config, train=replace(config.train, global_batch=config.train.global_batch // ranks)
    )


def run_synthetic_step(config: Config, tokenizer: Tokenizer) -> StepRecord:
    """Runs the first step in this process alone.

    Returns:
        The record that training would log.

    Raises:
        ValueError: the settings or the model folder cannot be used.
        NonFiniteLoss: the loss or its gradient is not finite.
    """
    with join_world() as world, tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)
        engine = Engine(model, config.train, world)
        log = LogWriter(Path(folder), begin_attempt(Path(folder)), world)
        step = TrainStep(config, engine, log, world, {"": config.train.global_batch})
        batches = random_batches(config.data, config.model, config.train, tokenizer)
        if config.data.features is not None:
            batches = _encoded(batches, cast(TextVideoModel, engine.module))
        return step(1, batches)


def _encoded(batches: Iterator[Batch], model: TextVideoModel) -> Iterator[Batch]:
    """The batches with outputs of the towers, as `data.features` stores them."""
    device = next(model.parameters()).device
    for batch in batches:
        with torch.no_grad():
            frames, _, texts, _ = stored_inputs(model, *model_inputs(batch, device))
        yield replace(batch, frames=frames.cpu(), token_ids=texts.cpu())


def random_batches(
    data: DataConfig, model: ModelConfig, train: TrainConfig, tokenizer: Tokenizer
) -> Iterator[Batch]:
    """Yields micro-batches of noise without padding; every video has its own id and caption."""
    pairs = train.micro_batch
    side = image_size(model)
    generator = torch.Generator().manual_seed(train.seed)

    def random_integers(
        high: int, *shape: int, low: int = 0, dtype: torch.dtype = torch.int64
    ) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=dtype)

    number = 0
    while True:
        positions = torch.arange(number, number + pairs)
        number += pairs
        token_ids = random_integers(tokenizer.vocab_size, pairs, tokenizer.max_words)
        token_ids[:, -1] = tokenizer.eos_token_id
        if (start := tokenizer.start_token_id) is not None:
            token_ids[:, 0] = start
        word_mask = random_integers(2 + data.content_words, pairs, tokenizer.max_words, low=1)
        word_mask[:, 0] = word_mask[:, -1] = 1  # start and end are no content words
        names = tuple(f"random-{position}" for position in positions.tolist())
        yield Batch(
            positions=positions,
            keys=names,
            video_ids=positions,
            frames=random_integers(256, pairs, data.num_frames, 3, side, side, dtype=torch.uint8),
            frame_mask=torch.ones(pairs, data.num_frames, dtype=torch.int64),
            captions=names,
            caption_ids=positions,
            token_ids=token_ids,
            word_mask=word_mask,
            caption_video=torch.arange(pairs),
        )
