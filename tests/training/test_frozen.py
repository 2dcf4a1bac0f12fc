"""Frozen layers and LoRA under ZeRO: checkpoints hold all weights, frozen ones included.

They load at any stage and on any number of ranks, into a model with other random weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.engine_states import (
    CPU,
    convert_to_universal,
    engine_from_universal,
    save_engine_state,
    seeded_model,
    train_losses,
)
from builders.exhaustive import further
from builders.spawn import spawn
from builders.tiny import tiny_config, with_ranks

from tvr.trainer.distributed.world import World
from tvr.trainer.engine.engine import Engine, consolidated_weights

KINDS: dict[str, dict[str, Any]] = {"layers": {"freeze": 1}, "lora": {"lora_rank": 2}}
STAGES = (1, 3)
RANKS = (1, 2)
BEFORE, AFTER = 2, 2


def settings(data: Path, kind: str, stage: int, world_size: int) -> Any:
    changes = {
        "zero_stage": stage,
        "learning_rate": 3e-3,
        "encoder_learning_rate": 1e-2,
        "layer_decay": 0.5,
        "weight_decay": 0.5,
    }
    return with_ranks(tiny_config(data, train=changes, model=KINDS[kind]), world_size)


def save_all(rank: int, world_size: int, data: Path, folder: Path) -> dict[str, list[float]]:
    """Trains and saves every kind at every stage; returns the losses of further steps at ZeRO-1."""
    world, beyond = World(rank=rank, world_size=world_size, device=CPU), {}
    for kind in KINDS:
        for stage in STAGES:
            config = settings(data, kind, stage, world_size)
            engine = Engine(seeded_model(config), config.train, world)
            train_losses(engine, config, world, 0, BEFORE)
            save_engine_state(engine, folder / f"{kind}-{stage}-{world_size}", world)
            if stage == 1:
                beyond[kind] = train_losses(engine, config, world, BEFORE, AFTER)
    return beyond


def load_all(rank: int, world_size: int, data: Path, folder: Path) -> Any:
    """Loads every state into a model with other weights; returns the losses of further steps."""
    world = World(rank=rank, world_size=world_size, device=CPU)
    results = {}
    for source in sorted(folder.iterdir()):
        kind, was_stage, was_ranks = source.name.split("-")
        for stage in STAGES:
            config = settings(data, kind, stage, world_size)
            if (int(was_stage), int(was_ranks)) == (stage, world_size):
                engine = Engine(seeded_model(config, seed=1), config.train, world)
                engine.load_checkpoint(source / "shards")
            else:
                universal = convert_to_universal(config, source, int(was_stage), world)
                engine = engine_from_universal(config, universal, world, seed=1)
            results[source.name, stage] = train_losses(engine, config, world, BEFORE, AFTER)
    return results


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("saved")
    expected = [spawn(save_all, ranks, data, folder, timeout_s=300.0)[0] for ranks in RANKS]
    for kind in KINDS:
        assert expected[0][kind] == pytest.approx(expected[1][kind], rel=1e-4)
    return folder, expected[0]


@pytest.mark.parametrize("ranks", [2, *further(1)])
def test_a_state_continues_at_any_stage_and_number_of_ranks(
    data: Path, saved: tuple[Path, Any], ranks: int
) -> None:
    folder, expected = saved
    found = spawn(load_all, ranks, data, folder, timeout_s=300.0)[0]
    assert len(found) == len(KINDS) * len(STAGES) ** 2 * len(RANKS)
    for (source, stage), values in found.items():
        kind = source.split("-")[0]
        assert values == pytest.approx(expected[kind], rel=1e-4), (source, stage)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_all_weights_and_frozen_ones_unchanged(
    data: Path, saved: tuple[Path, Any], kind: str
) -> None:
    model = seeded_model(settings(data, kind, 1, 1))
    start = model.state_dict()
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("tower." in name for name in trains)
    for source in saved[0].glob(f"{kind}-*"):
        weights = consolidated_weights(source / "shards", int(source.name.split("-")[1]))
        assert weights.keys() == start.keys(), source.name
        for name, weight in weights.items():
            moved = not torch.equal(weight, start[name])
            # The frame predictor gets no gradient, and norms have no weight decay.
            if name not in trains:
                assert not moved, (source.name, name)
            elif "tower." in name and name.endswith("weight") and "k_proj" not in name:
                assert moved, (source.name, name)
