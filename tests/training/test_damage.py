"""Runs with damaged checkpoints or a full disk: they report it and continue."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import jobs
from builders.exhaustive import principal_and_further
from builders.file_damage import DAMAGE
from builders.scraping import parse_samples, scrape
from builders.tiny import tiny_config, with_ranks

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.verification import find_newest_intact
from tvr.trainer.config import CheckpointConfig, Config, MetricsConfig, to_json
from tvr.trainer.distributed.world import World
from tvr.trainer.loop import train

ALONE = World(rank=0, world_size=1, device=torch.device("cpu"))
STEPS = 6
# Bytes: room for the log and the settings, but not for a rank's files of a checkpoint.
SMALL_FILE = 30_000
FULL_STEPS = 80


def settings(data: Path, steps: int) -> Config:
    return tiny_config(
        data,
        data={"test": None, "test_exchanged": None},
        train={"steps": steps, "log_every": 2},
        checkpoint={"every": 2, "keep_last": STEPS},
    )


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(settings(data, STEPS), run_dir)
    return run_dir


FILES = ["manifest.json", "random-rank-00000.pt", "mp_rank_00_model_states.pt", "optim_states.pt"]


@pytest.mark.parametrize(
    ("name", "kind"),
    principal_and_further(
        [*((name, "one bit") for name in FILES), (FILES[3], "truncated"), (FILES[2], "gone")],
        [(FILES[3], "one bit"), (FILES[2], "gone")],
    ),
)
def test_run_resumes_from_the_checkpoint_before_a_damaged_one(
    data: Path, uninterrupted: Path, tmp_path: Path, name: str, kind: str
) -> None:
    config, run_dir = settings(data, STEPS), tmp_path / "run"
    jobs.copy_run_at_step(4, uninterrupted, run_dir)
    folder = run_dir / "checkpoints" / "step-00000004"
    (path,) = folder.rglob(f"*{name}")
    DAMAGE[kind](path)
    train(config, run_dir)
    (event,) = jobs.events(run_dir, "checkpoint_damaged")
    assert any(str(path) in line for line in event["errors"])
    assert [event["step"] for event in jobs.events(run_dir, "resumed")] == [2]
    assert jobs.losses(run_dir) == jobs.losses(uninterrupted)
    ours, theirs = (jobs.final_weights(run, config) for run in (run_dir, uninterrupted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_full_disk_costs_checkpoints_and_not_the_run(data: Path, tmp_path: Path) -> None:
    config, run_dir = with_ranks(settings(data, FULL_STEPS), 2), tmp_path / "run"
    file = tmp_path / "settings.json"
    file.write_text(to_json(config))
    storage, left = StorageFolder(str(run_dir / "checkpoints")), []

    def fill_the_disk(pids: list[int]) -> None:
        jobs.until(lambda: jobs.steps_logged(run_dir) >= 4)
        before = resource.prlimit(pids[1], resource.RLIMIT_FSIZE)
        resource.prlimit(pids[1], resource.RLIMIT_FSIZE, (SMALL_FILE, before[1]))
        jobs.until(lambda: bool(jobs.events(run_dir, "save_failed")))
        left.append(find_newest_intact(storage, ALONE).newest)
        resource.prlimit(pids[1], resource.RLIMIT_FSIZE, before)

    assert jobs.run_forked(file, run_dir, 2, fill_the_disk) == [0, 0]
    failed = jobs.events(run_dir, "save_failed")
    assert all(event["error"].startswith("rank 1: OSError: [Errno 27]") for event in failed)
    assert left[0] is not None
    assert left[0].state.step < failed[0]["step"]
    (written,) = (run_dir / "metrics").glob("*.prom")
    last = parse_samples(written.read_text())
    assert last["tvr_checkpoint_failures_total",] == len(failed) >= 1
    assert last["tvr_checkpoint_saves_total",] == len(jobs.events(run_dir, "saved"))
    found = find_newest_intact(storage, ALONE)
    assert found.damaged == {}
    assert found.newest is not None
    assert found.newest.state.step == FULL_STEPS
    assert jobs.steps_logged(run_dir) == FULL_STEPS


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Mounts a file system of this size."""
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(line, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"this machine allows no mount: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Fills the disk to the last byte."""
    with (disk / "ballast").open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Keeps the disk full during the block."""
    fill(disk)
    yield
    (disk / "ballast").unlink()


def test_run_survives_a_full_disk_and_logs_all_events_later(data: Path, tmp_path: Path) -> None:
    config = replace(
        settings(data, 1_000_000), metrics=MetricsConfig(address="127.0.0.1", endpoint="node")
    )
    with small_disk(tmp_path / "disk", 32 << 20) as disk:
        run_dir = disk / "run"
        storage = StorageFolder(str(run_dir / "checkpoints"))

        def values() -> dict[str, float]:
            (file,) = (run_dir / "metrics").glob("*.json")
            (target,) = json.loads(file.read_text())[0]["targets"]
            found = parse_samples(scrape(f"http://{target}/metrics"))
            return {name: value for (name, *labels), value in found.items() if not labels}

        def nothing_is_written() -> bool:
            # A failed save frees its space again.
            fill(disk)
            return values()["tvr_train_step"] > jobs.steps_logged(run_dir) + 20

        def fails_again() -> None:
            failures = values()["tvr_checkpoint_failures_total"]
            jobs.until(nothing_is_written)
            jobs.until(lambda: values()["tvr_checkpoint_failures_total"] > failures)

        found: list[Any] = []

        def fill_the_disk_twice(pids: list[int]) -> None:
            jobs.until(lambda: jobs.steps_logged(run_dir) >= 4)
            with full(disk):
                fails_again()
                before = find_newest_intact(storage, ALONE)
                logged = jobs.steps_logged(run_dir)
            saves = values()["tvr_checkpoint_saves_total"]
            jobs.until(lambda: values()["tvr_checkpoint_saves_total"] > saves)
            jobs.until(lambda: jobs.steps_logged(run_dir) > logged)
            events = jobs.events(run_dir, "step"), jobs.events(run_dir, "save_failed")
            found.extend([before, *events])
            fill(disk)
            fails_again()
            os.kill(pids[1], signal.SIGUSR1)

        settings_file = jobs.write_settings(config, tmp_path / "full", 2)
        output = tmp_path / "errors.txt"
        codes = jobs.run_forked(settings_file, run_dir, 2, fill_the_disk_twice, output)
        errors = output.read_text()
        assert codes == [3, 3], errors
        (disk / "ballast").unlink()
        before, steps, failed = found
        assert before.newest is not None
        assert before.damaged == {}
        assert [event["step"] for event in steps] == list(range(2, steps[-1]["step"] + 1, 2))
        assert before.newest.state.step < failed[0]["step"]
        assert all("[Errno 28] No space left on device" in event["error"] for event in failed)
        assert "log.jsonl: the disk is full; new lines wait in memory" in errors
        assert "log.jsonl: the waiting lines are written" in errors
        assert re.search(
            r"step \d+ is not saved: rank \d: .*No space left.*; asked to stop by", errors
        )
        after = find_newest_intact(storage, ALONE)
        assert after.newest is not None
        assert after.newest.state.step > before.newest.state.step


def test_unsaved_last_checkpoint_fails_the_run(data: Path, tmp_path: Path) -> None:
    config = replace(settings(data, 20), checkpoint=CheckpointConfig(every=0))
    output = tmp_path / "errors.txt"
    with small_disk(tmp_path / "disk", 32 << 20) as disk:
        run_dir = disk / "run"

        def fill_the_disk(pids: list[int]) -> None:
            jobs.until((run_dir / "log.jsonl").exists)
            fill(disk)

        settings_file = jobs.write_settings(config, tmp_path / "last", 2)
        codes = jobs.run_forked(settings_file, run_dir, 2, fill_the_disk, output)
    errors = output.read_text()
    assert codes == [3, 3], errors
    assert "step 20, the last one, is not saved: rank 0: OSError: [Errno 28]" in errors
