"""Checks before a run begins: each failure is reported with its rank and host."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
import torch
from builders.spawn import spawn
from builders.tiny import tiny_config, with_ranks
from torch import nn

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer import data as inputs_file
from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import CheckpointConfig, Config, to_json
from tvr.trainer.data import build_tokenizer
from tvr.trainer.distributed import world as world_file
from tvr.trainer.distributed.world import World
from tvr.trainer.errors import PreflightFailed
from tvr.trainer.memory import rank_memory as rank_memory_file
from tvr.trainer.memory.rank_memory import rank_memory
from tvr.trainer.model.model import build_meta_model
from tvr.trainer.records import Finding
from tvr.trainer.resilience import preflight as preflight_file
from tvr.trainer.resilience.preflight import (
    SETTINGS,
    check_disk,
    check_memory,
    find_differences,
    preflight,
)
from tvr.trainer.run_dir import checkpoints_of

CPU = torch.device("cpu")
ALONE = World(rank=0, world_size=1, device=CPU)
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def config(data: Path) -> Config:
    return tiny_config(data, data={"test": None, "test_exchanged": None}, train={"steps": 1})


@pytest.mark.parametrize("url", [None, "memory://preflight"])
def test_usable_storage_is_left_unchanged(config: Config, tmp_path: Path, url: str | None) -> None:
    config = replace(config, checkpoint=CheckpointConfig(url=url))
    preflight(config, tmp_path, ALONE)
    assert checkpoints_of(config.checkpoint, tmp_path).list_names() == []
    assert list(tmp_path.iterdir()) == []


Refusal: TypeAlias = tuple[list[str], int | None]


def refusals(rank: int, world_size: int, config: Config, folder: Path) -> Refusal:
    """The failures and the rank at fault; rank 1 has another batch size."""
    world = World(rank=rank, world_size=world_size, device=CPU)
    world.check_connection(60.0)
    if rank == 1:
        config = replace(config, train=replace(config.train, global_batch=16))
    try:
        preflight(config, folder / str(rank), world)
    except PreflightFailed as failed:
        return failed.lines, failed.rank
    return [], None


def test_all_ranks_get_every_failure_of_every_rank(config: Config, tmp_path: Path) -> None:
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
    for rank in (1, 2):
        (tmp_path / str(rank) / "checkpoints").write_text("no folder")
    refusal, *others = spawn(refusals, 3, config, tmp_path)
    assert all(other == refusal for other in others)
    (settings, *errors), rank_at_fault = refusal
    assert rank_at_fault is None
    assert settings.startswith(f"rank 1 on {HOST}: the sha256 of its settings is ")
    assert [line.split(" cannot be used for checkpoints")[0] for line in errors] == [
        f"rank {rank} on {HOST}: {tmp_path / str(rank) / 'checkpoints'}" for rank in (1, 2)
    ]


def check_without_rank_1(rank: int, world_size: int) -> None:
    """Rank 1 joins the group but not its first collective."""
    if rank == 1:
        time.sleep(60)
    World(rank=rank, world_size=world_size, device=CPU).check_connection(0.5)


def test_missing_rank_is_noticed_soon() -> None:
    with pytest.raises(RuntimeError, match=f"rank 0 on {HOST} cannot reach the other 1 on cpu"):
        spawn(check_without_rank_1, 2)


def test_ranks_that_differ_from_the_majority_are_named() -> None:
    usual = {"torch": "2.13", SETTINGS: "a"}
    identities = [usual, usual | {"torch": "2.12", SETTINGS: "b"}, usual, usual | {SETTINGS: "c"}]
    assert find_differences(identities) == [
        Finding(1, "torch is 2.12, on most ranks 2.13", is_node_fault=True),
        Finding(1, f"{SETTINGS} is b, on most ranks a", is_node_fault=True),
        Finding(3, f"{SETTINGS} is c, on most ranks a", is_node_fault=False),
    ]


def test_checkpoints_larger_than_the_disk_are_refused(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "not" / "there"
    tokenizer = build_tokenizer(config.model, config.data)
    model = build_meta_model(config.model, config.loss, tokenizer, num_frames=3)
    check_disk(config.checkpoint, config.train, run_dir, model, ALONE)
    with torch.device("meta"):
        model.register_parameter("vast", nn.Parameter(torch.empty(10**7, 10**6)))
    for total, rank in ((10**15, 0), (10**12, None)):
        disk = SimpleNamespace(free=10**9, total=total)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, disk=disk: disk)
        with pytest.raises(PreflightFailed, match=r"3 more checkpoints of 1.6e\+05 GB") as no:
            check_disk(config.checkpoint, config.train, run_dir, model, ALONE)
        assert no.value.rank == rank
    elsewhere = CheckpointConfig(url="memory://disk")
    check_disk(elsewhere, config.train, run_dir, model, ALONE)


class TwoEqualRanks(World):
    """Rank 0 of two on one machine; the other rank sends the same objects."""

    def all_gather_objects(self, mine: Any) -> list[Any]:
        return [mine, mine]

    def run_on_first(self, action: Callable[[], Any], *, patient: bool = False) -> Any:
        return action()


def test_states_larger_than_the_memory_are_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, tokenizer = with_ranks(config, 2), build_tokenizer(config.model, config.data)
    needs = rank_memory(config, tokenizer, 2)
    assert 0 < needs.states < needs.total

    def with_free(num_bytes: int, total: int = 4 * needs.total) -> None:
        monkeypatch.setattr(preflight_file, "free_bytes", lambda: num_bytes)
        monkeypatch.setattr(preflight_file, "total_bytes", lambda: total)
        check_memory(config, tokenizer, TwoEqualRanks(rank=0, world_size=2, device=CPU))

    with_free(2 * needs.total)
    assert not caplog.records
    with_free(2 * needs.states)
    assert "a step may need" in caplog.text
    with pytest.raises(
        PreflightFailed, match="weights, gradients and optimiser of 2 ranks of this machine need"
    ) as no:
        with_free(2 * needs.states - 1)
    assert [line.split(":")[0] for line in no.value.lines] == [
        f"rank {rank} on {HOST}" for rank in range(2)
    ]
    assert no.value.rank == 0
    with pytest.raises(PreflightFailed) as no:
        with_free(2 * needs.states - 1, total=2 * needs.states - 1)
    assert no.value.rank is None


def test_offloaded_state_does_not_count_as_device_memory(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def states(offload: str, kind: str) -> tuple[int, int]:
        monkeypatch.setattr(rank_memory_file, "device", lambda: kind)
        monkeypatch.setattr(rank_memory_file, "device_scores_per_tile", lambda device: 2**20)
        train = replace(with_ranks(config, 2).train, zero_stage=3, offload=offload)
        needs = rank_memory(
            replace(config, train=train), build_tokenizer(config.model, config.data), 2
        )
        return needs.states, needs.model.weights

    whole, weights = states("none", "cuda")
    assert states("optimizer", "cuda") == (weights, weights)
    assert states("parameters", "cuda") == (0, weights)
    assert states("parameters", "cpu") == (whole, weights)


def raise_disk_full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train_on_a_full_disk(rank: int, world_size: int, settings: Path, run_dir: Path) -> int:
    """Exit code of `tvr train` if the checkpoints' disk is full on rank 1's node."""
    if rank == 1:
        StorageFolder.open_write = raise_disk_full
    return tvr_train(["--config", str(settings), "--run-dir", str(run_dir)])


def test_rank_on_the_faulty_node_reports_and_the_job_may_start_elsewhere(
    config: Config, tmp_path: Path
) -> None:
    settings, run_dir = tmp_path / "settings.json", tmp_path / "run"
    settings.write_text(to_json(with_ranks(config, 2)))
    assert spawn(train_on_a_full_disk, 2, settings, run_dir) == [3, 3]
    (file,) = (run_dir / "failures").iterdir()
    report = json.loads(file.read_text())
    assert (report["rank"], report["code"]) == (1, 3)
    assert f"PreflightFailed: rank 1 on {HOST}: " in report["error"]
    assert report["error"].endswith(
        "cannot be used for checkpoints: OSError: [Errno 28] No space left on device"
    )


def train_without_the_data(rank: int, world_size: int, settings: Path, run_dir: Path) -> int:
    """Exit code of `tvr train` if rank 1's node lacks the data."""
    if rank == 1:
        inputs_file.read_manifest = lambda url, **_: read_manifest(f"{url}-elsewhere")
    return tvr_train(["--config", str(settings), "--run-dir", str(run_dir)])


def test_node_without_the_data_is_at_fault(config: Config, tmp_path: Path) -> None:
    settings, run_dir = tmp_path / "settings.json", tmp_path / "run"
    settings.write_text(to_json(with_ranks(config, 2)))
    assert spawn(train_without_the_data, 2, settings, run_dir) == [3, 3]
    (file,) = (run_dir / "failures").iterdir()
    report = json.loads(file.read_text())
    assert report["of"] == 1
    assert f"PreflightFailed: rank 1 on {HOST}: " in report["error"]
    assert "train-elsewhere" in report["error"]


def test_run_folder_is_checked_if_checkpoints_go_elsewhere(config: Config, tmp_path: Path) -> None:
    config = replace(config, checkpoint=CheckpointConfig(url="memory://elsewhere"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(PreflightFailed, match="/file cannot be used for a run: ") as no:
        preflight(config, tmp_path / "file", ALONE)
    assert no.value.rank is None


def test_network_failure_is_no_fault_of_the_settings(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(world_file.dist, "all_reduce", broken)
    settings = tmp_path / "settings.json"
    settings.write_text(to_json(config))
    assert tvr_train(["--config", str(settings), "--run-dir", str(tmp_path / "run")]) == 3
    line = capsys.readouterr().err
    assert line.startswith(f"tvr train: error: rank 0 on {HOST} cannot reach the other 0 on cpu")
    assert line.count("\n") == 1


def test_node_without_the_gpus_of_the_job_is_refused(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(world_file.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("TVR_GPUS_PER_NODE", "2")
    monkeypatch.delenv("DS_ACCELERATOR")
    settings = tmp_path / "settings.json"
    settings.write_text(to_json(config))
    assert tvr_train(["--config", str(settings), "--run-dir", str(tmp_path / "run")]) == 3
    line = capsys.readouterr().err
    assert line.startswith(
        f"tvr train: error: rank 0 on {HOST} sees 1 CUDA devices, and the job asked for 2 on each"
    )
    assert ("CPU build" in line, "--nv" in line, line.count("\n")) == (True, True, 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("gpus", "accelerator"), [("1", None), ("2", "cpu"), (None, None)], ids=str
)
def test_node_with_the_gpus_of_the_job_or_a_cpu_job_is_accepted(
    gpus: str | None, accelerator: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world_file.torch.cuda, "device_count", lambda: 1)
    for name, value in (("TVR_GPUS_PER_NODE", gpus), ("DS_ACCELERATOR", accelerator)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with world_file.join_world() as world:
        assert world.world_size == 1


def test_small_data_set_and_unusable_storage_exit_with_code_2(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(run_dir: Path, **train: Any) -> str:
        settings = tmp_path / "settings.json"
        settings.write_text(to_json(replace(config, train=replace(config.train, **train))))
        code = tvr_train(["--config", str(settings), "--run-dir", str(run_dir)])
        assert code == 2
        return capsys.readouterr().err

    assert "holds 48 samples, fewer than train.global_batch=64" in refused(
        tmp_path / "run", global_batch=64, micro_batch=64
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").write_text("no folder")
    line = refused(tmp_path / "other")
    assert line.startswith(f"tvr train: error: rank 0 on {HOST}: ")
    assert line.count("\n") == 1
