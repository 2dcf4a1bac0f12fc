"""A state saved at any ZeRO stage on any number of ranks can be loaded at any other.

Training then gives the same losses as a run that was never moved, up to rounding.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
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
from builders.exhaustive import everything
from builders.spawn import spawn
from builders.tiny import tiny_config, with_ranks

from tvr.launchers.host_limits import HostCpus
from tvr.trainer.distributed.world import World
from tvr.trainer.engine import conversion, staging
from tvr.trainer.engine.engine import (
    Engine,
    consolidated_weights,
    universal_target,
    write_universal,
)
from tvr.trainer.engine.staging import pinned_bytes, staged_bytes
from tvr.trainer.engine.universal import holds_weights
from tvr.trainer.errors import TrainingFailed
from tvr.trainer.memory.model_memory import staged_tensor_bytes

STAGES = (0, 1, 2, 3)
RANKS = (1, 2)
BEFORE, AFTER = 3, 2


def stages(precision: str) -> tuple[int, ...]:
    return STAGES if precision == "fp32" else STAGES[1:]


def targets(source: int, precision: str) -> tuple[int, ...]:
    """Stages at which a state of a stage is loaded; without TVR_CI=1, the one after its own."""
    every = stages(precision)
    return every if everything() else (every[(source + 1) % len(every)],)


def settings(data: Path, stage: int, world_size: int, precision: str = "fp32") -> Any:
    # The parameter groups differ in every setting of the optimiser. If one group got another
    # group's settings, the losses would show it.
    changes = {
        "zero_stage": stage,
        "precision": precision,
        "learning_rate": 3e-3,
        "encoder_learning_rate": 1e-3,
        "weight_decay": 0.5,
    }
    return with_ranks(tiny_config(data, train=changes), world_size)


def save_all_stages(
    rank: int, world_size: int, data: Path, folder: Path, precision: str = "fp32"
) -> list[float]:
    """Trains and saves at every stage; returns the losses of the steps after the save at ZeRO-1."""
    world, after = World(rank=rank, world_size=world_size, device=CPU), []
    for stage in stages(precision):
        config = settings(data, stage, world_size, precision)
        engine = Engine(seeded_model(config), config.train, world)
        train_losses(engine, config, world, 0, BEFORE)
        save_engine_state(engine, folder / f"{stage}-{world_size}", world)
        if stage == 1:
            after = train_losses(engine, config, world, BEFORE, AFTER)
    return after


def load_all(rank: int, world_size: int, data: Path, folder: Path, precision: str) -> Any:
    """Loads every saved state at every stage; returns the losses of the steps that follow.

    Their keys are (stage-ranks of the saved state, stage at which it was loaded).
    """
    world = World(rank=rank, world_size=world_size, device=CPU)
    results = {}
    for source in sorted(folder.iterdir()):
        for stage in targets(int(source.name[0]), precision):
            config = settings(data, stage, world_size, precision)
            universal = convert_to_universal(config, source, int(source.name[0]), world)
            engine = engine_from_universal(config, universal, world)
            results[source.name, stage] = train_losses(engine, config, world, BEFORE, AFTER)
    return results


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The saved states of all stages and numbers of ranks, and the expected losses."""
    folder = tmp_path_factory.mktemp("saved")
    expected = [spawn(save_all_stages, ranks, data, folder)[0] for ranks in RANKS]
    assert expected[0] == pytest.approx(expected[1], rel=1e-4)
    return folder, expected[0]


@pytest.mark.parametrize("ranks", RANKS)
def test_training_continues_at_any_stage_on_any_number_of_ranks(
    data: Path, saved: tuple[Path, list[float]], ranks: int
) -> None:
    folder, expected = saved
    found = spawn(load_all, ranks, data, folder, "fp32", timeout_s=300.0)[0]
    assert len(found) == len(STAGES) * len(RANKS) * len(targets(0, "fp32"))
    for moved, values in found.items():
        assert values == pytest.approx(expected, rel=1e-4), moved


def test_fp32_state_continues_in_bf16(data: Path, saved: tuple[Path, list[float]]) -> None:
    folder, expected = saved
    found = spawn(load_all, 1, data, folder, "bf16", timeout_s=300.0)[0]
    assert len(found) == len(STAGES) * len(RANKS) * len(targets(0, "bf16"))
    for moved, values in found.items():
        assert values == pytest.approx(expected, rel=0.05), moved


@pytest.fixture(scope="module")
def saved_in_bf16(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("saved-bf16")
    return folder, spawn(save_all_stages, 2, data, folder, "bf16")[0]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_bf16_state_continues_at_any_stage_and_in_fp32(
    data: Path, saved_in_bf16: tuple[Path, list[float]], precision: str
) -> None:
    folder, expected = saved_in_bf16
    found = spawn(load_all, 1, data, folder, precision, timeout_s=300.0)[0]
    assert len(found) == len(stages("bf16")) * len(targets(1, precision))
    for moved, values in found.items():
        assert values == pytest.approx(expected, rel=0.05), moved


def test_consolidated_weights_of_bf16_are_the_fp32_ones(
    saved_in_bf16: tuple[Path, list[float]],
) -> None:
    first, *others = (
        consolidated_weights(saved_in_bf16[0] / f"{stage}-2" / "shards", stage)
        for stage in stages("bf16")
    )
    trained = [name for name, value in first.items() if not torch.equal(value, value.bfloat16())]
    assert len(trained) > 0.5 * len(first)  # so the fp32 weights were read, not the bf16 ones
    for weights in others:
        same = torch.cat(
            [
                torch.isclose(weights[name], weight, rtol=1e-3, atol=1e-3).flatten()
                for name, weight in first.items()
            ]
        )
        # Adam moves a weight whose gradient is near 0 by its learning rate, in either direction.
        assert same.float().mean() > 0.999


def test_consolidated_weights_are_equal_from_every_stage(saved: tuple[Path, list[float]]) -> None:
    folder, _ = saved
    plain = consolidated_weights(folder / "0-1" / "shards", 0)
    for source in folder.iterdir():
        weights = consolidated_weights(source / "shards", int(source.name[0]))
        for name, weight in plain.items():
            # Where the exact gradient is 0 (biases before a softmax), Adam's steps are rounding.
            close = torch.allclose(weights[name], weight, rtol=1e-3, atol=1e-3)
            assert close, (source.name, name)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_model_s_own_file_holds_the_weights_of_the_optimiser_in_fp32(
    saved: tuple[Path, list[float]], stage: int
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    source = saved[0] / f"{stage}-2"
    masters = get_fp32_state_dict_from_zero_checkpoint(str(source), tag="shards")
    weights = consolidated_weights(source / "shards", stage)
    assert masters is not None
    for name, weight in weights.items():
        assert torch.equal(weight, masters[name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_read_from_the_files_that_hold_them_alone(
    saved: tuple[Path, list[float]], tmp_path: Path, stage: int
) -> None:
    source = saved[0] / f"{stage}-2" / "shards"
    expected = consolidated_weights(source, stage)
    (tmp_path / "shards").mkdir()
    for file in source.iterdir():
        if holds_weights(file.name, stage, "fp32"):
            (tmp_path / "shards" / file.name).symlink_to(file)
    weights = consolidated_weights(tmp_path / "shards", stage)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_conversion_by_several_processes_writes_the_same_files(
    data: Path, saved: tuple[Path, list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "MIN_BYTES_PER_WORKER", 1)
    monkeypatch.setattr(conversion, "host_cpus", lambda: HostCpus(3, 3, None))
    config = settings(data, 1, 1)
    target = universal_target(seeded_model(config), config.train, 1)

    def convert(stage: int) -> None:
        shards = saved[0] / f"{stage}-2" / "shards"
        conversion.convert(shards, tmp_path / f"{stage}-several" / "universal", stage, target)

    # Each conversion starts a process, which takes most of its time. Stage 2 is converted as 1 is.
    ways = (0, 1, 3) if everything() else (1,)
    with ThreadPoolExecutor(len(ways)) as pool:
        list(pool.map(convert, ways))
    for stage in ways:
        one, several = tmp_path / f"{stage}-one" / "universal", tmp_path / f"{stage}-several"
        write_universal(saved[0] / f"{stage}-2" / "shards", one, stage, target)
        ours = {str(path.relative_to(one)): path for path in one.rglob("*.pt")}
        theirs = {
            str(path.relative_to(several / "universal")): path for path in several.rglob("*.pt")
        }
        assert ours.keys() == theirs.keys()
        assert len(ours) > 4 * len(target.shapes)
        for name, path in ours.items():
            assert path.read_bytes() == theirs[name].read_bytes(), (stage, name)


def test_failed_conversion_says_why(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "MIN_BYTES_PER_WORKER", 1)
    monkeypatch.setattr(conversion, "host_cpus", lambda: HostCpus(2, 2, None))
    config, shards = settings(data, 1, 1), tmp_path / "shards"
    shards.mkdir()
    (shards / "mp_rank_00_model_states.pt").write_bytes(b"no checkpoint")
    target = universal_target(seeded_model(config), config.train, 1)
    with pytest.raises(TrainingFailed, match=r"shards cannot be converted for this job: .*Error"):
        conversion.convert(shards, tmp_path / "universal", 0, target)


@pytest.mark.parametrize(
    ("size", "cores", "free", "workers"),
    [
        (64 << 30, 96, 1 << 40, 96),
        (64 << 30, 96, 64 << 30, 32),  # a worker holds a shard of 1 GiB, and copies of its parts
        (1 << 30, 96, 1 << 40, 4),  # more would start for longer than they work
        (1 << 20, 96, 1 << 40, 1),
        (64 << 30, 2, 1 << 20, 1),
    ],
)
def test_conversion_takes_as_many_processes_as_cores(
    size: int, cores: int, free: int, workers: int
) -> None:
    assert conversion.num_workers([size // 64] * 64, cores, free) == workers


def test_a_gpu_job_converts_without_turning_deepspeed_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tvr.trainer.engine import engine

    for has_gpu, expected in ((True, None), (False, "cpu")):
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.setattr("torch.cuda.is_available", lambda found=has_gpu: found)
        engine._import_deepspeed(None)
        assert os.environ.get("DS_ACCELERATOR") == expected


@pytest.mark.parametrize("stage", STAGES)
def test_memory_of_a_staged_copy_is_estimated_tensor_by_tensor(
    data: Path, saved: tuple[Path, list[float]], monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    config = settings(data, stage, 2)
    sizes = list(staged_tensor_bytes(seeded_model(config), config.train, 2))
    names = [f"{part}mp_rank_00_model_states.pt" for part in ("", "zero_pp_rank_0_")]
    names.append("zero_pp_rank_0_mp_rank_00_optim_states.pt")
    files = [saved[0] / f"{stage}-2" / "shards" / name for name in names]
    state = [torch.load(file, weights_only=False) for file in files if file.exists()]
    # Counters, and the alignment of ZeRO's partitions, are not estimated.
    assert sum(sizes) == pytest.approx(staged_bytes(state), rel=0.01)
    monkeypatch.setattr(staging, "_is_staged_pinned", lambda tensor: True)
    assert sum(map(pinned_bytes, sizes)) == pytest.approx(staged_bytes(state), rel=0.01)
