"""A state saved on any number of ranks at any ZeRO stage goes on on any other: the same losses as
one that was never moved, to rounding."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from spawn import spawn
from tiny import tiny_config, with_ranks

from tvr.trainer.engine import Engine, reader_of, weights_of, write_universal
from tvr.trainer.gather import gather_rows
from tvr.trainer.inputs import training_batches
from tvr.trainer.model import build_model, model_inputs
from tvr.trainer.objective import objective
from tvr.trainer.tokenizer import load_tokenizer
from tvr.trainer.world import World

STAGES = (0, 1, 2, 3)
RANKS = (1, 2)
BEFORE, AFTER = 3, 3
CPU = torch.device("cpu")


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


def losses(engine: Engine, config: Any, world: World, first: int, count: int) -> list[float]:
    """Losses of steps first + 1 to first + count, each followed by its update."""
    tokenizer = load_tokenizer(config.model.tokenizer, config.data.max_words)
    batches = training_batches(config, tokenizer, world)
    for _ in range(first):
        next(batches)
    values = []
    for _ in range(count):
        batch = next(batches)
        features = engine.encode(*model_inputs(batch, CPU))
        mine = objective(features, batch.video_ids, config.model, config.loss, world)
        engine.backward(mine.for_backward)
        engine.step(1.0)
        everyone = gather_rows(mine.shares[None], world, (1,) * world.world_size)
        values.append(float(everyone[:, 0].sum()))
    return values


def model_of(config: Any) -> Any:
    tokenizer = load_tokenizer(config.model.tokenizer, config.data.max_words)
    torch.manual_seed(0)
    return build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)


def save_all(rank: int, world_size: int, data: Path, folder: Path) -> list[float]:
    """Trains and saves at every stage; and the losses of the steps beyond, at ZeRO-1."""
    world, beyond = World(rank=rank, world_size=world_size, device=CPU), []
    for stage in STAGES:
        config = settings(data, stage, world_size)
        engine = Engine(model_of(config), config.train, world)
        losses(engine, config, world, 0, BEFORE)
        shards = folder / f"{stage}-{world_size}" / "shards"
        shards.mkdir(parents=True, exist_ok=True)
        for name, value in engine.stage().items():
            torch.save(value, shards / name)
        if stage == 1:
            beyond = losses(engine, config, world, BEFORE, AFTER)
    return beyond


def load_all(rank: int, world_size: int, data: Path, folder: Path, precision: str) -> Any:
    """The losses of the steps beyond, by stage and ranks of the source and stage of the target."""
    world = World(rank=rank, world_size=world_size, device=CPU)
    results = {}
    for source in sorted(folder.iterdir()):
        was_stage = int(source.name[0])
        for stage in STAGES:
            if precision == "bf16" and stage == 0:
                continue
            config = settings(data, stage, world_size, precision)
            model = model_of(config)
            reader = reader_of(model, config.train, world_size)
            scratch = world.from_first(lambda: tempfile.mkdtemp(prefix="tvr-universal-"))
            universal = Path(scratch) / "universal"
            shards, wanted = source / "shards", was_stage
            world.from_first(
                lambda s=shards, u=universal, w=wanted, r=reader: write_universal(s, u, w, r)
            )
            engine = Engine(model, config.train, world, universal=True)
            engine.load(universal)
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
    plain = weights_of(folder / "0-1" / "shards", 0)
    for source in folder.iterdir():
        joined = weights_of(source / "shards", int(source.name[0]))
        for name, weight in plain.items():
            # Where a true gradient is 0 (biases before a softmax), Adam makes steps of rounding.
            assert torch.allclose(joined[name], weight, rtol=1e-3, atol=1e-3), (source.name, name)
