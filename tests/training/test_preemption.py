"""Jobs that a signal asks to stop: their exit code, and their resumption.

The job resumes on other numbers of ranks and at another ZeRO stage.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from builders import jobs
from builders.tiny import tiny_config

from tvr.trainer.config import Config


@pytest.fixture(scope="module")
def config(data: Path) -> Config:
    return tiny_config(
        data,
        data={"test": None, "test_exchanged": None},
        train={"steps": 48, "log_keys": True, "zero_stage": 1},
    )


def run_until_stopped(
    config: Config, run_dir: Path, ranks: int, *, rank: int, number: int, step: int
) -> int:
    """Signals one rank once `step` is logged; returns the step that the job saved."""
    with jobs.running(config, run_dir, ranks) as job:
        jobs.signal_rank(job, run_dir, rank, number, lambda: jobs.steps_logged(run_dir) >= step)
        _, errors = job.communicate(timeout=jobs.TIMEOUT_S)
    assert job.returncode == 75, errors
    saved = jobs.events(run_dir, "preempted")[-1]["step"]
    assert f"step {saved} is saved; asked to stop by" in errors
    assert (run_dir / "checkpoints" / f"step-{saved:08d}").is_dir()
    return saved


def run_alone_until_terminated(config: Config, run_dir: Path, *, step: int) -> int:
    """Terminates the only rank once `step` is logged; returns the step that it saved."""

    def terminate(pids: list[int]) -> None:
        jobs.until(lambda: jobs.steps_logged(run_dir) >= step)
        os.kill(pids[0], signal.SIGTERM)

    settings, output = jobs.write_settings(config, run_dir, 1), run_dir.with_suffix(".txt")
    codes = jobs.run_forked(settings, run_dir, 1, terminate, output)
    assert codes == [75], output.read_text()
    saved = jobs.events(run_dir, "preempted")[-1]["step"]
    assert f"step {saved} is saved; asked to stop by SIGTERM" in output.read_text()
    return saved


def test_stopped_job_resumes_on_other_ranks_and_at_another_stage(
    config: Config, tmp_path: Path
) -> None:
    whole, moved = tmp_path / "uninterrupted", tmp_path / "moved"
    assert jobs.run_forked(jobs.write_settings(config, whole, 2), whole, 2) == [0, 0]
    first = run_until_stopped(config, moved, 2, rank=1, number=signal.SIGUSR1, step=3)
    second = run_alone_until_terminated(config, moved, step=first + 2)
    settings = jobs.write_settings(jobs.with_stage(config, 3), moved, 2)
    assert jobs.run_forked(settings, moved, 2) == [0, 0]
    assert [event["step"] for event in jobs.events(moved, "resumed")] == [first, second]
    assert jobs.losses(moved) == pytest.approx(jobs.losses(whole), rel=2e-3)
    assert jobs.losses(moved)[:first] == jobs.losses(whole)[:first]
    # 48 samples, 8 per step: an epoch has 6 steps and reads every sample once.
    batches = jobs.global_batches(moved)
    assert list(batches) == list(range(1, 49))
    keys = [key for step in batches.values() for key in step]
    for epoch in range(8):
        assert len(set(keys[48 * epoch : 48 * epoch + 48])) == 48
    assert batches == jobs.global_batches(whole)
