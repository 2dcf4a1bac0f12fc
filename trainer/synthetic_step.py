"""One optimiser step of a configured model on random data, by the path that training takes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tvr.data_prep.records import Batch
from tvr.trainer.config import Config
from tvr.trainer.distributed.world import join_world
from tvr.trainer.engine.engine import Engine
from tvr.trainer.fencing import begin_attempt
from tvr.trainer.model.model import build_model, image_size
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.monitoring.run_log import LogWriter
from tvr.trainer.train_step import OptimiserStep


def single_rank_config(config: Config, ranks: int) -> Config:
    """What one rank of `ranks` does of each step, as a configuration for a rank alone."""
    return replace(
        config, train=replace(config.train, global_batch=config.train.global_batch // ranks)
    )


def run_synthetic_step(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The first step on this process alone; what training would log of it.

    Raises:
        ValueError: settings or a model folder that cannot be used.
        NonFiniteLoss: as in training.
    """
    with join_world() as world, tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)
        engine = Engine(model, config.train, world)
        log = LogWriter(Path(folder), begin_attempt(Path(folder)), world)
        step = OptimiserStep(config, engine, log, world, config.train.global_batch)
        return step.take(1, random_batches(config, tokenizer))


def random_batches(config: Config, tokenizer: Tokenizer) -> Iterator[Batch]:
    """Full micro-batches of noise: all frames and word slots are taken, all videos differ."""
    pairs, data = config.train.micro_batch, config.data
    side = image_size(config.model)
    generator = torch.Generator().manual_seed(config.train.seed)

    def drawn(
        high: int, *shape: int, low: int = 0, dtype: torch.dtype = torch.int64
    ) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=dtype)

    number = 0
    while True:
        positions = torch.arange(number, number + pairs)
        number += pairs
        token_ids = drawn(tokenizer.vocab_size, pairs, tokenizer.max_words)
        token_ids[:, 0], token_ids[:, -1] = tokenizer.bos_token_id, tokenizer.eos_token_id
        word_mask = drawn(2 + data.content_words, pairs, tokenizer.max_words, low=1)
        word_mask[:, 0] = word_mask[:, -1] = 1  # never content
        names = tuple(f"random-{position}" for position in positions.tolist())
        yield Batch(
            positions=positions,
            keys=names,
            video_ids=positions,
            frames=drawn(256, pairs, data.num_frames, 3, side, side, dtype=torch.uint8),
            frame_mask=torch.ones(pairs, data.num_frames, dtype=torch.int64),
            captions=names,
            token_ids=token_ids,
            word_mask=word_mask,
            caption_video=torch.arange(pairs),
        )
