"""What tests of moved states share: an engine's steps, states in folders, going on from them."""

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


def model_of(config: Config, seed: int = 0) -> TextVideoModel:
    torch.manual_seed(seed)
    return build_model(
        config.model,
        config.loss,
        build_tokenizer(config.model, config.data),
        num_frames=config.data.num_frames,
    )


def losses(engine: Any, config: Config, world: World, first: int, count: int) -> list[float]:
    """Losses of steps first + 1 to first + count, each followed by its update."""
    batches = training_batches(
        config, build_tokenizer(config.model, config.data), world, start_step=first
    )
    values = []
    for _ in range(count):
        batch = next(batches)
        features = engine.encode(*model_inputs(batch, CPU))
        mine = objective(features, batch.video_ids, config.model, config.loss, world)
        engine.backward(mine.for_backward)
        engine.step(1.0)
        everyone = all_gather_rows(mine.shares[None], world, (1,) * world.world_size)
        values.append(float(everyone[:, 0].sum()))
    return values


def save_state(engine: Engine, folder: Path, world: World) -> None:
    """Writes every rank's part of the state to folder/shards."""
    shards = folder / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    for name, value in engine.state_dict(copy=False).items():
        torch.save(value, shards / name)
    world.barrier()


def universal_of(config: Config, source: Path, was_stage: int, world: World) -> Path:
    """The universal form, for as many ranks as there are now, of a state in source/shards."""
    universal = source / f"universal-{world.world_size}"

    def convert() -> None:
        if not universal.exists():
            reader = universal_target(model_of(config), config.train, world.world_size)
            write_universal(source / "shards", universal, was_stage, reader)

    world.run_on_first(convert)
    return universal


def engine_from(config: Config, universal: Path, world: World, seed: int = 0) -> Engine:
    """Goes on from a universal form, in a model that began with other random weights."""
    model = model_of(config, seed)
    load_frozen_weights(model, universal)
    engine = Engine(model, config.train, world, universal=True)
    engine.load_checkpoint(universal)
    return engine
