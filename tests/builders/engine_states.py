"""Training steps of a bare engine, and its state saved, converted and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tvr.trainer.config import Config
from tvr.trainer.data import build_tokenizer, training_batches
from tvr.trainer.distributed.collectives import all_gather_rows
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.engine import Engine, universal_target, write_universal
from tvr.trainer.engine.universal import load_frozen_weights
from tvr.trainer.loss.objective import objective
from tvr.trainer.model.model import TextVideoModel, build_model, model_inputs

CPU = torch.device("cpu")


def seeded_model(config: Config, seed: int = 0) -> TextVideoModel:
    """A model whose initial weights depend on the seed alone."""
    torch.manual_seed(seed)
    return build_model(
        config.model,
        config.loss,
        build_tokenizer(config.model, config.data),
        num_frames=config.data.num_frames,
    )


def train_losses(engine: Any, config: Config, world: World, first: int, count: int) -> list[float]:
    """Trains steps first + 1 to first + count; returns each step's loss before its update."""
    tokenizer = build_tokenizer(config.model, config.data)
    batches = training_batches(
        config.data, config.model, config.train, tokenizer, world, start_step=first
    )
    values = []
    for _ in range(count):
        batch = next(batches)
        features = engine.encode(*model_inputs(batch, CPU))
        terms = objective(
            features,
            batch.video_ids,
            config.model,
            config.loss,
            world,
            caption_ids=batch.caption_ids,
        )
        engine.backward(terms.for_backward)
        engine.step(1.0)
        shares = all_gather_rows(terms.shares[None], world, (1,) * world.world_size)
        values.append(float(shares[:, 0].sum()))
    return values


def save_engine_state(engine: Engine, folder: Path, world: World) -> None:
    """Writes every rank's part of the engine's state to folder/shards."""
    shards = folder / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    for name, value in engine.state_dict(copy=False).items():
        torch.save(value, shards / name)
    world.barrier()


def convert_to_universal(config: Config, source: Path, zero_stage: int, world: World) -> Path:
    """Converts the state in source/shards for this number of ranks, unless it is there already.

    `zero_stage` is the stage at which the state was saved. Returns the folder.
    """
    universal = source / f"universal-{world.world_size}"

    def convert() -> None:
        if not universal.exists():
            target = universal_target(seeded_model(config), config.train, world.world_size)
            write_universal(source / "shards", universal, zero_stage, target)

    world.run_on_first(convert)
    return universal


def engine_from_universal(config: Config, universal: Path, world: World, seed: int = 0) -> Engine:
    """Loads a universal state into a model with other initial weights."""
    model = seeded_model(config, seed)
    load_frozen_weights(model, universal)
    engine = Engine(model, config.train, world, universal=True)
    engine.load_checkpoint(universal)
    return engine
