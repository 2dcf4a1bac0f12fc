"""Ranks killed with SIGKILL at random steps and while a checkpoint is written: what comes out in
the end is what an undisturbed run gives, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import jobs
import pytest
import torch
from tiny import tiny_config

from tvr.trainer.config import Config

STEPS = 60


def settings(data: Path, zero_stage: int) -> Config:
    return tiny_config(
        data,
        data={"test": None, "test_exchanged": None},
        train={"steps": STEPS, "zero_stage": zero_stage},
        checkpoint={"every": 2},
    )


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(
    data: Path, tmp_path: Path, zero_stage: int
) -> None:
    config = settings(data, zero_stage)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, errors = jobs.run(config, whole, 2)
    assert code == 0, errors
    kills = 0
    for attempt in range(4):
        rank = attempt % 2
        step = jobs.random_step(10 * zero_stage + attempt, 8 * attempt + 1, 8 * attempt + 8)
        in_a_save = attempt >= 2
        with jobs.running(config, killed, 2) as job:
            jobs.signal_rank(
                job,
                killed,
                rank,
                signal.SIGKILL,
                lambda step=step, in_a_save=in_a_save: (
                    jobs.steps_logged(killed) >= step and (not in_a_save or jobs.is_writing(killed))
                ),
            )
            _, errors = job.communicate(timeout=jobs.TIMEOUT_S)
            assert job.returncode == 3, errors
            kills += 1
    assert kills == 4
    code, errors = jobs.run(config, killed, 2)
    assert code == 0, errors
    assert jobs.losses(killed) == jobs.losses(whole)
    assert len(jobs.losses(whole)) == STEPS
    ours, theirs = (jobs.final_weights(run, config) for run in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(list((killed / "attempts").iterdir())) == 5
