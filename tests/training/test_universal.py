"""A state saved on any number of ranks at any ZeRO stage goes on on any other: the same losses as
one that was never moved, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.carried import CPU, engine_from, losses, model_of, save_state, universal_of
from builders.spawn import spawn
from builders.tiny import tiny_config, with_ranks

from tvr.trainer.distributed.world import World
from tvr.trainer.engine.engine import Engine, consolidated_weights

STAGES = (0, 1, 2, 3)
RANKS = (1, 2)
BEFORE, AFTER = 3, 2


def settings(data: Path, stage: int, world_size: int, precision: str = "fp32") -> Any:
    # Groups of parameters that differ in all that an optimiser's group can differ in: what one
    # group's settings do to another shows in the losses.
    changes = {
        "zero_stage": stage,
        "precision": precision,
        "learning_rate": 3e-3,
        "encoder_learning_rate": 1e-3,
        "weight_decay": 0.5,
    }
    return with_ranks(tiny_config(data, train=changes), world_size)


def save_all(rank: int, world_size: int, data: Path, folder: Path) -> list[float]:
    """Trains and saves at every stage; and the losses of the steps beyond, at ZeRO-1."""
    world, beyond = World(rank=rank, world_size=world_size, device=CPU), []
    for stage in STAGES:
        config = settings(data, stage, world_size)
        engine = Engine(model_of(config), config.train, world)
        losses(engine, config, world, 0, BEFORE)
        save_state(engine, folder / f"{stage}-{world_size}", world)
        if stage == 1:
            beyond = losses(engine, config, world, BEFORE, AFTER)
    return beyond


def load_all(rank: int, world_size: int, data: Path, folder: Path, precision: str) -> Any:
    """The losses of the steps beyond, by stage and ranks of the source and stage of the target."""
    world = World(rank=rank, world_size=world_size, device=CPU)
    results = {}
    for source in sorted(folder.iterdir()):
        for stage in STAGES:
            if precision == "bf16" and stage == 0:
                continue
            config = settings(data, stage, world_size, precision)
            universal = universal_of(config, source, int(source.name[0]), world)
            engine = engine_from(config, universal, world)
            results[source.name, stage] = losses(engine, config, world, BEFORE, AFTER)
    return results


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("saved")
    expected = [spawn(save_all, ranks, data, folder)[0] for ranks in RANKS]
    assert expected[0] == pytest.approx(expected[1], rel=1e-4)
    return folder, expected[0]


@pytest.mark.parametrize("ranks", RANKS)
def test_any_stage_and_number_of_ranks_goes_on_at_any_other(
    data: Path, saved: tuple[Path, list[float]], ranks: int
) -> None:
    folder, expected = saved
    found = spawn(load_all, ranks, data, folder, "fp32", timeout_s=300.0)[0]
    assert len(found) == len(STAGES) * len(RANKS) * len(STAGES)
    for moved, values in found.items():
        assert values == pytest.approx(expected, rel=1e-4), moved


def test_float32_goes_on_in_bfloat16(data: Path, saved: tuple[Path, list[float]]) -> None:
    folder, expected = saved
    found = spawn(load_all, 1, data, folder, "bf16", timeout_s=300.0)[0]
    for moved, values in found.items():
        assert values == pytest.approx(expected, rel=0.05), moved


def test_weights_are_the_same_from_every_stage(saved: tuple[Path, list[float]]) -> None:
    folder, _ = saved
    plain = consolidated_weights(folder / "0-1" / "shards", 0)
    for source in folder.iterdir():
        joined = consolidated_weights(source / "shards", int(source.name[0]))
        for name, weight in plain.items():
            # Where a true gradient is 0 (biases before a softmax), Adam makes steps of rounding.
            assert torch.allclose(joined[name], weight, rtol=1e-3, atol=1e-3), (source.name, name)
