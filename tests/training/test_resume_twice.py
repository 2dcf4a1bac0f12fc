"""A run that is stopped and resumed twice equals one that never stopped, bit for bit."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders import jobs
from builders.exhaustive import everything, principal_and_further
from builders.spawn import spawn
from builders.tiny import tiny_config

from tvr.data_prep.records import Batch
from tvr.trainer import loop
from tvr.trainer.build_run import TrainingRun
from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import Config, to_json
from tvr.trainer.monitoring.step_record import StepRecord

STOPS = (2, 4)
FORMS: dict[str, dict[str, Any]] = {
    "stage 0": {"zero_stage": 0},
    "bf16 at stage 3": {"zero_stage": 3, "precision": "bf16"},
    # DeepSpeed's BF16_Optimizer.
    "accumulated bf16 at stage 1": {"zero_stage": 1, "precision": "bf16", "micro_batch": 2},
}

PRINCIPAL = ["accumulated bf16 at stage 1"]


def settings(data: Path, form: str) -> Config:
    return tiny_config(
        data,
        data={"test": None, "test_exchanged": None},
        train={"steps": 6, "micro_batch": 4, **FORMS[form]},
        metrics={"enabled": False},
    )


class Stopping:
    """The optimiser step of a run that asks its job to stop during one step."""

    def __init__(self, run: TrainingRun, stop: int | None) -> None:
        self._step, self._stop = run.train_step, stop if run.world.is_first else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def __call__(self, step: int, batches: Iterator[Batch]) -> StepRecord:
        if step == self._stop:
            os.kill(os.getpid(), signal.SIGUSR1)
        return self._step(step, batches)


def run_all(rank: int, world_size: int, data: Path, folder: Path) -> dict[str, list[int]]:
    """Runs every form without and with stops; returns the exit codes of each start."""
    codes = {}
    for number, form in enumerate(FORMS):
        if not everything() and form not in PRINCIPAL:
            continue
        starts = [("whole", None), *(("stopped", stop) for stop in (*STOPS, None))]
        codes[form] = [
            start(settings(data, form), folder / f"{name}-{number}", stop) for name, stop in starts
        ]
    return codes


def start(config: Config, run_dir: Path, stop: int | None) -> int:
    def build_run(*args: Any, **options: Any) -> TrainingRun:
        run = original(*args, **options)
        stopping: Any = Stopping(run, stop)
        return replace(run, train_step=stopping)

    original = loop.build_run
    file = run_dir.with_suffix(f".{os.environ['RANK']}.json")  # the ranks write it at any time
    file.write_text(to_json(config))
    with redirect_stderr(io.StringIO()), patch.object(loop, "build_run", build_run):
        return tvr_train(["--config", str(file), "--run-dir", str(run_dir)])


@pytest.fixture(scope="module")
def runs(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, list[int]]]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, spawn(run_all, 2, data, folder, timeout_s=400)


@pytest.mark.parametrize("form", principal_and_further(FORMS, PRINCIPAL))
def test_two_resumes_change_nothing(
    data: Path, runs: tuple[Path, list[dict[str, list[int]]]], form: str
) -> None:
    folder, codes = runs
    assert [by_form[form] for by_form in codes] == [[0, 75, 75, 0]] * 2
    number, config = list(FORMS).index(form), settings(data, form)
    whole, stopped = folder / f"whole-{number}", folder / f"stopped-{number}"
    assert [event["step"] for event in jobs.events(stopped, "resumed")] == list(STOPS)
    assert jobs.losses(stopped) == jobs.losses(whole)
    ours, theirs = (jobs.final_weights(run_dir, config) for run_dir in (stopped, whole))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
