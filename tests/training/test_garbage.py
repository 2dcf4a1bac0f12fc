"""Garbage is collected on the schedule of `train.gc_every`, and by Python again after the loop."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.tiny import tiny_config

from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import to_json
from tvr.trainer.errors import TrainingFailed
from tvr.trainer.memory.garbage import scheduled_garbage_collection
from tvr.trainer.train_step import TrainStep

STEPS = 7


@pytest.fixture(autouse=True)
def nothing_is_frozen() -> Iterator[None]:
    """As in a process of a user; conftest freezes what the tests import."""
    gc.unfreeze()
    yield
    gc.freeze()


class Circle:
    """An object that only the garbage collector frees."""

    def __init__(self) -> None:
        self.itself = self


@contextmanager
def watched_collections() -> Iterator[list[int]]:
    """Lists the generation of every collection in the block."""
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    gc.callbacks.append(note)
    try:
        yield generations
    finally:
        gc.callbacks.remove(note)


def make_circles() -> weakref.ref[Circle]:
    """Enough garbage for Python to collect it by itself; returns a reference to one of it."""
    circle = weakref.ref(Circle())
    for _ in range(20_000):
        Circle()
    return circle


def test_garbage_is_collected_at_the_steps_of_the_schedule() -> None:
    with scheduled_garbage_collection(3) as garbage, watched_collections() as generations:
        assert not gc.isenabled()
        circle = make_circles()
        for step in (1, 2):
            garbage.step_finished(step)
        assert (generations, circle() is None) == ([], False)
        garbage.step_finished(3)
        assert (generations, circle() is None) == ([2], True)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_zero_leaves_the_schedule_to_python() -> None:
    with scheduled_garbage_collection(0) as garbage, watched_collections() as generations:
        assert gc.isenabled()
        garbage.step_finished(0)
        assert generations == []
        make_circles()
        assert generations


@pytest.mark.parametrize("enabled", [True, False])
def test_state_is_restored_after_an_error(enabled: bool) -> None:
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(OSError, match="no"), scheduled_garbage_collection(3):
            raise OSError("no")
        assert (gc.isenabled(), gc.get_freeze_count()) == (enabled, 0)
    finally:
        gc.enable()


def run(
    data: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None
) -> list[tuple[int, bool, int]]:
    """Trains `STEPS` steps, or until the step that is to fail; returns what each step finds.

    That is: its number, whether Python may collect, and the collections since the loop began.
    """
    settings = run_dir.with_suffix(".json")
    test = {"test": None, "test_exchanged": None}
    config = tiny_config(data, data=test, train={"steps": STEPS, "gc_every": 3})
    settings.write_text(to_json(config))
    found: list[tuple[int, bool, int]] = []
    take_step = TrainStep.__call__

    def observed(self: TrainStep, step: int, batches: Any) -> Any:
        if step == 1:
            generations.clear()
        record = take_step(self, step, batches)
        found.append((step, gc.isenabled(), len(generations)))
        if step == fail_at:
            raise OSError("no")
        return record

    with watched_collections() as generations, monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", observed)
        with pytest.raises(TrainingFailed) if fail_at else nullcontext():
            assert tvr_train(["--config", str(settings), "--run-dir", str(run_dir)]) == 0
    return found


def test_loop_collects_on_the_schedule(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(data, tmp_path / "run", monkeypatch)
    assert found == [(step, False, (step - 1) // 3) for step in range(1, STEPS + 1)]
    assert gc.isenabled()
    found = run(data, tmp_path / "failing", monkeypatch, fail_at=2)
    assert found == [(1, False, 0), (2, False, 0)]
    assert gc.isenabled()


def test_steps_leave_no_tensor_to_the_collector(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between collections such tensors would fill a GPU.
    left: list[torch.Tensor] = []
    take_step = TrainStep.__call__

    def observed(self: TrainStep, step: int, batches: Any) -> Any:
        if step == 3:  # the first steps fill caches
            gc.collect()
            gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            record = take_step(self, step, batches)
            gc.collect()
            left.extend(x for x in gc.garbage if isinstance(x, torch.Tensor))
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
        return record

    monkeypatch.setattr(TrainStep, "__call__", observed)
    settings = tmp_path / "settings.json"
    test = {"test": None, "test_exchanged": None}
    train = {"steps": 3, "gradient_cache": True}
    settings.write_text(to_json(tiny_config(data, data=test, train=train)))
    assert tvr_train(["--config", str(settings), "--run-dir", str(tmp_path / "run")]) == 0
    assert left == []
