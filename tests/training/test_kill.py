"""Ranks killed by SIGKILL at random steps and while a checkpoint is written.

The resumed run ends as an uninterrupted one, bit for bit, with dropout on.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from builders import jobs
from builders.exhaustive import further
from builders.pretrained import save_clip
from builders.tiny import IMAGE_SIZE, MAX_WORDS, tiny_config, with_ranks

from tvr.trainer import loop
from tvr.trainer.checkpoint import restore
from tvr.trainer.config import Config, to_json
from tvr.trainer.model.tokenizer import load_tokenizer

# Each stage kills one rank after a step and the other one during a save; the stages take turns.
RANKS, STEPS, KILLS = 2, 16, 2
SEED = 2026


@pytest.fixture(scope="module")
def towers(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Towers with an attention dropout of 0.3."""
    folder = tmp_path_factory.mktemp("towers")
    tokenizer = load_tokenizer(data / "tokenizer", MAX_WORDS)
    save_clip(folder, tokenizer, width=16, image_size=IMAGE_SIZE, dropout=0.3)
    return folder


def settings(data: Path, towers: Path, zero_stage: int, **train: int) -> Config:
    config = tiny_config(
        data,
        data={"test": None, "test_exchanged": None},
        model={"pretrained": str(towers), "tokenizer": None},
        train={"steps": STEPS, "zero_stage": zero_stage, **train},
        checkpoint={"every": 2},
        metrics={"endpoint": "none"},
    )
    return with_ranks(config, RANKS)


def kill(pids: list[int], rank: int, run_dir: Path, step: int, *, in_a_save: bool) -> None:
    """Kills a rank after a step, or during the next save after it."""
    deadline = time.monotonic() + jobs.TIMEOUT_S
    while True:
        assert time.monotonic() < deadline, "the run never reaches the condition"
        if jobs.steps_logged(run_dir) < step or (in_a_save and not jobs.is_writing(run_dir)):
            time.sleep(0.002)
            continue
        # Suspended, so that the condition still holds when the signal arrives.
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        hit = not in_a_save or jobs.is_writing(run_dir)
        if hit:
            os.kill(pids[rank], signal.SIGKILL)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        if hit:
            return


@pytest.mark.parametrize("zero_stage", [3, *further(1, 2)])
def test_repeatedly_killed_run_ends_as_an_uninterrupted_one(
    data: Path, towers: Path, tmp_path: Path, zero_stage: int
) -> None:
    config = settings(data, towers, zero_stage)
    file = tmp_path / "settings.json"
    file.write_text(to_json(config))
    whole, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert jobs.run_forked(file, whole, RANKS) == [0, 0]
    draw, span = random.Random(SEED + zero_stage), STEPS // KILLS - 1
    for attempt in range(KILLS):
        rank, in_a_save = (attempt + zero_stage) % RANKS, attempt >= KILLS // 2
        step = attempt * span + draw.randint(1, span)
        print(f"ZeRO-{zero_stage}: kills rank {rank} after step {step}, {in_a_save=}, {SEED=}")
        codes = jobs.run_forked(
            file,
            killed,
            RANKS,
            lambda pids, r=rank, s=step, i=in_a_save: kill(pids, r, killed, s, in_a_save=i),
        )
        assert codes[rank] == -signal.SIGKILL
        assert codes[1 - rank] == 3
    assert jobs.run_forked(file, killed, RANKS) == [0, 0]
    assert len(list((killed / "attempts").iterdir())) == KILLS + 1
    assert jobs.losses(killed) == jobs.losses(whole)
    assert len(jobs.losses(whole)) == STEPS
    ours, theirs = (jobs.final_weights(run, config) for run in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_dropout_follows_the_saved_random_state(
    data: Path, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(data, towers, 1, steps=4, micro_batch=8)
    whole, same, other = (tmp_path / name for name in ("whole", "same", "other"))
    loop.train(with_ranks(config, 1), whole)
    for run_dir in (same, other):
        jobs.copy_run_at_step(2, whole, run_dir)
    loop.train(with_ranks(config, 1), same)
    assert jobs.losses(same) == jobs.losses(whole)
    monkeypatch.setattr(restore, "set_random_state", lambda state: None)
    loop.train(with_ranks(config, 1), other)
    assert jobs.losses(other)[:2] == jobs.losses(whole)[:2]
    for ours, theirs in zip(jobs.losses(other)[2:], jobs.losses(whole)[2:], strict=True):
        assert ours != theirs
