"""Jobs that are told to leave: on which signal, with which exit code, and how they go on on other
numbers of ranks and at other ZeRO stages."""

from __future__ import annotations

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


def told_to_leave(
    config: Config, run_dir: Path, ranks: int, *, rank: int, number: int, step: int
) -> int:
    """Signals one rank once a step is logged; returns the step that was saved."""
    with jobs.running(config, run_dir, ranks) as job:
        jobs.signal_rank(job, run_dir, rank, number, lambda: jobs.steps_logged(run_dir) >= step)
        _, errors = job.communicate(timeout=jobs.TIMEOUT_S)
    assert job.returncode == 75, errors
    left = jobs.events(run_dir, "preempted")[-1]["step"]
    assert f"step {left} is saved; asked to stop by" in errors
    assert (run_dir / "checkpoints" / f"step-{left:08d}").is_dir()
    return left


def test_other_ranks_and_another_stage_go_on_where_it_was_left(
    config: Config, tmp_path: Path
) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    code, errors = jobs.run(config, whole, 2)
    assert code == 0, errors
    first = told_to_leave(config, moved, 2, rank=1, number=signal.SIGUSR1, step=3)
    second = told_to_leave(config, moved, 1, rank=0, number=signal.SIGTERM, step=first + 2)
    code, errors = jobs.run(jobs.with_stage(config, 3), moved, 2)
    assert code == 0, errors
    assert [event["step"] for event in jobs.events(moved, "resumed")] == [first, second]
    assert jobs.losses(moved) == pytest.approx(jobs.losses(whole), rel=2e-3)
    assert jobs.losses(moved)[:first] == jobs.losses(whole)[:first]
    # 48 samples, 8 a step: an epoch is 6 steps, and each sees every sample once.
    batches = jobs.global_batches(moved)
    assert list(batches) == list(range(1, 49))
    keys = [key for step in batches.values() for key in step]
    for epoch in range(8):
        assert len(set(keys[48 * epoch : 48 * epoch + 48])) == 48
    assert batches == jobs.global_batches(whole)
