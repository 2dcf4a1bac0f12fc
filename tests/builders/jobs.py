"""Training jobs that tests signal and kill while they run, and readers of what the jobs wrote."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from builders.slurm_cluster import process_of_a_rank
from builders.spawn import started
from builders.tiny import with_ranks

from tvr.launchers.rank_main import end_process
from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import Config, to_json
from tvr.trainer.engine.engine import consolidated_weights
from tvr.trainer.monitoring.run_log import read_log

TIMEOUT_S = 180.0


def command(config: Config, run_dir: Path, ranks: int) -> list[str]:
    """`tvr launch local --ranks N -- tvr train`, with the global batch split over the ranks."""
    settings = write_settings(config, run_dir, ranks)
    train = ["tvr", "train", "--config", str(settings), "--run-dir", str(run_dir)]
    launch = [sys.executable, "-m", "tvr.launchers.cli", "launch", "local", "--ranks", str(ranks)]
    return [*launch, "--", *train]


def write_settings(config: Config, run_dir: Path, ranks: int) -> Path:
    """Writes the settings for this number of ranks to a file beside the run's folder."""
    settings = run_dir.with_name(f"{run_dir.name}-{ranks}-{config.train.zero_stage}.json")
    settings.write_text(to_json(with_ranks(config, ranks)))
    return settings


@contextmanager
def running(config: Config, run_dir: Path, ranks: int) -> Iterator[subprocess.Popen[str]]:
    """Starts the job; kills it if it still runs at the end of the block."""
    job = subprocess.Popen(command(config, run_dir, ranks), stderr=subprocess.PIPE, text=True)
    try:
        yield job
    finally:
        if job.poll() is None:
            job.kill()
        job.wait()


def run(config: Config, run_dir: Path, ranks: int) -> tuple[int, str]:
    """Runs a job to its end; returns its exit code and error output."""
    with running(config, run_dir, ranks) as job:
        _, errors = job.communicate(timeout=TIMEOUT_S)
        return job.returncode, errors


def train_rank(
    rank: int, world_size: int, settings: Path, run_dir: Path, errors: Path | None
) -> None:
    """Runs `tvr train` on a rank of `spawn.started` and exits with its code."""
    if errors is not None:
        with errors.open("ab") as file:
            os.dup2(file.fileno(), 2)
    end_process(tvr_train(["--config", str(settings), "--run-dir", str(run_dir)]))


def run_forked(
    settings: Path,
    run_dir: Path,
    ranks: int,
    disturb: Callable[[list[int]], None] | None = None,
    errors: Path | None = None,
) -> list[int | None]:
    """Runs ranks without a launcher, forked from a preloaded process; returns their exit codes.

    That takes a tenth of the time of `run`, whose processes import all libraries.

    Args:
        disturb: Is called with the process ids of the ranks while they run.
        errors: File to which all ranks append their error output.
    """
    job = (settings, run_dir, errors)
    with started(train_rank, ranks, *job, timeout_s=TIMEOUT_S) as (processes, _):
        if disturb is not None:
            disturb([process.pid for process in processes if process.pid is not None])
        for process in processes:
            process.join(TIMEOUT_S)
        return [process.exitcode for process in processes]


def wait_for(job: subprocess.Popen[str], condition: Callable[[], bool]) -> bool:
    """Polls without pause until the condition holds; returns False if the job ends first."""
    deadline = time.monotonic() + TIMEOUT_S
    while job.poll() is None:
        if condition():
            return True
        assert time.monotonic() < deadline, "the job never reaches the condition"
    return False


def until(condition: Callable[[], bool], pause_s: float = 0.01) -> None:
    """Polls until the condition holds."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never holds"
        time.sleep(pause_s)


def stop_rank_after(step: int, run_dir: Path) -> Callable[[list[int]], None]:
    """Returns what `run_forked` calls to announce a preemption to rank 1 after a step is logged."""

    def disturb(pids: list[int]) -> None:
        until(lambda: steps_logged(run_dir) >= step)
        os.kill(pids[1], signal.SIGUSR1)

    return disturb


def rank_pid(run_dir: Path, rank: int) -> int | None:
    """Process id of a rank of the run's job; None if it does not run."""
    found: dict[int, int] = {}
    for process in psutil.process_iter():
        try:
            line, environment = process.cmdline(), process.environ()
            parent = process.ppid()
        except psutil.Error:
            continue  # ended meanwhile, or not ours
        if "tvr.launchers.rank_main" in line and str(run_dir) in line:
            if environment.get("RANK") == str(rank):
                found[process.pid] = parent
    return process_of_a_rank(found)


def signal_rank(
    job: subprocess.Popen[str],
    run_dir: Path,
    rank: int,
    number: int,
    condition: Callable[[], bool],
) -> None:
    """Signals a rank as soon as the condition holds."""
    found: list[int] = []

    def is_there() -> bool:
        pid = rank_pid(run_dir, rank)
        found.extend([] if pid is None else [pid])
        return bool(found)

    # Found in advance, since the search takes longer than a step.
    assert wait_for(job, is_there), job.stderr and job.stderr.read()
    assert wait_for(job, condition), job.stderr and job.stderr.read()
    os.kill(found[0], number)


def steps_logged(run_dir: Path) -> int:
    """Newest step in the log; 0 if there is none."""
    path = run_dir / "log.jsonl"
    log = read_log(path.read_text()) if path.exists() else None
    return log.steps[-1]["step"] if log and log.steps else 0


def is_writing(run_dir: Path) -> bool:
    """True while a checkpoint is being written: a step's folder has no manifest yet."""
    folders = (run_dir / "checkpoints").glob("step-*")
    return any(not (folder / "manifest.json").exists() for folder in folders)


def losses(run_dir: Path) -> list[float]:
    """The loss of every logged step."""
    return [step["loss"] for step in read_log((run_dir / "log.jsonl").read_text()).steps]


def final_weights(run_dir: Path, config: Config) -> dict[str, torch.Tensor]:
    """The weights in the last step's checkpoint."""
    shards = shards_folder(run_dir, config.train.steps)
    return consolidated_weights(shards, config.train.zero_stage)


def shards_folder(run_dir: Path, step: int) -> Path:
    """The folder of a step's shards."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return folder / json.loads((folder / "manifest.json").read_text())["folder"] / "shards"


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The logged events of one kind."""
    # A line that is being written has no end yet.
    lines = (run_dir / "log.jsonl").read_text().rpartition("\n")[0].splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def global_batches(run_dir: Path) -> dict[int, list[str]]:
    """The sample keys of each step, sorted: each number of ranks divides a step in its own way."""
    batches: dict[int, list[str]] = {}
    for file in sorted((run_dir / "keys").iterdir()):
        for line in map(json.loads, file.read_text().splitlines()):
            batches.setdefault(line["step"], []).extend(line["keys"])
    return {step: sorted(keys) for step, keys in sorted(batches.items())}


def copy_run_at_step(step: int, source: Path, run_dir: Path) -> None:
    """Copies a run in the state in which a kill after the save of `step` would leave it."""
    shutil.copytree(source, run_dir)
    checkpoints = run_dir / "checkpoints"
    for folder in checkpoints.glob("step-*"):
        if folder.name > f"step-{step:08d}":
            shutil.rmtree(folder)
    (checkpoints / "latest").write_text(f"step-{step:08d}\n")


def with_stage(config: Config, zero_stage: int) -> Config:
    """The same settings with another ZeRO stage."""
    return replace(config, train=replace(config.train, zero_stage=zero_stage))
