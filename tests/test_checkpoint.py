"""Checkpoints: which is the newest, which are kept, which are refused; a save that broke off."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tvr.trainer.checkpoint import (
    KEPT,
    SavedState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from tvr.trainer.errors import CheckpointIncompatible
from tvr.trainer.world import World

ALONE = World(rank=0, world_size=1, device=torch.device("cpu"))


class FileEngine:
    """Saves a file of its own where DeepSpeed would write shards."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def save(self, folder: Path, tag: str, state: Mapping[str, Any]) -> None:
        (folder / tag / "weights").write_text(tag)

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        self.loaded.append((folder / tag / "weights").read_text())
        return {}


class BrokenEngine:
    """Dies in the middle of writing, as a killed process does."""

    def save(self, folder: Path, tag: str, state: Mapping[str, Any]) -> None:
        (folder / tag / "weights").write_text("half")
        raise RuntimeError("killed")


class NoEngine:
    """Must not be touched at all."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"engine.{name} was used")


def state(step: int, **changes: int) -> SavedState:
    return SavedState(**({"step": step, "world_size": 1, "zero_stage": 1} | changes))


def save(engine: Any, folder: Path, step: int) -> Path:
    return save_checkpoint(engine, folder, state(step), ALONE)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_there_is_none_at_first(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None
    (tmp_path / "step-00000003").mkdir()  # not claimed by `latest`: not known to be complete
    assert latest_checkpoint(tmp_path) is None


def test_the_newest_is_found_and_two_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (3, 20, 100):
        path = save(FileEngine(), folder, step)
        assert path == folder / f"step-{step:08d}"
        assert latest_checkpoint(folder) == (path, state(step))
    assert KEPT == 2
    assert names(folder) == ["latest", "step-00000020", "step-00000100"]
    assert names(folder / "step-00000100") == [
        "random-state-rank-00000.pt",
        "state.json",
        "weights",
    ]
    # Written under another name and renamed when whole.
    assert (folder / "step-00000100" / "weights").read_text() == ".step-00000100.partial"


def test_a_save_that_broke_off_leaves_the_one_before(tmp_path: Path) -> None:
    save(FileEngine(), tmp_path, 3)
    with pytest.raises(RuntimeError, match="killed"):
        save(BrokenEngine(), tmp_path, 6)
    assert latest_checkpoint(tmp_path) == (tmp_path / "step-00000003", state(3))
    assert names(tmp_path) == [".step-00000006.partial", "latest", "step-00000003"]


def test_the_leftovers_of_an_earlier_attempt_are_replaced(tmp_path: Path) -> None:
    save(FileEngine(), tmp_path, 3)
    # Of this step, broken off and whole, and of a later one whose `latest` was never written.
    for leftover in (".step-00000006.partial", "step-00000006", "step-00000009"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "stale").write_text("of the earlier attempt")
    path = save(FileEngine(), tmp_path, 6)
    assert names(path) == ["random-state-rank-00000.pt", "state.json", "weights"]
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000006"]
    assert latest_checkpoint(tmp_path) == (path, state(6))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: [file.unlink() for file in path.iterdir()],
        lambda path: (path / "state.json").write_text("{"),
        lambda path: (path / "state.json").write_text("[]"),
        lambda path: (path / "state.json").write_text(json.dumps({"step": 3, "ranks": 1})),
    ],
    ids=["gone", "torn", "a list", "other fields"],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: Any) -> None:
    damage(save(FileEngine(), tmp_path, 3))
    with pytest.raises(
        CheckpointIncompatible, match=r"latest names step-00000003, which cannot be read: "
    ):
        latest_checkpoint(tmp_path)


def test_a_pointer_to_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step-00000009\n")
    with pytest.raises(CheckpointIncompatible, match="latest names step-00000009"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"world_size": 4}, "world_size=4, this run has world_size=1; continue with 4"),
        ({"zero_stage": 3}, "zero_stage=3, this run has zero_stage=1; continue with 3"),
    ],
)
def test_another_number_of_ranks_or_stage_is_refused_untouched(
    tmp_path: Path, changes: dict[str, int], said: str
) -> None:
    engine: Any = NoEngine()
    path = tmp_path / "step-00000003"
    with pytest.raises(CheckpointIncompatible, match=rf"step-00000003 was saved with {said}"):
        load_checkpoint(engine, path, state(3, **changes), state(3), ALONE)


def test_loading_restores_weights_and_random_state(tmp_path: Path) -> None:
    torch.manual_seed(11)
    engine: Any = FileEngine()
    path = save(engine, tmp_path, 3)
    expected = torch.rand(5)
    torch.manual_seed(12)
    load_checkpoint(engine, path, state(3), state(3), ALONE)
    assert engine.loaded == [".step-00000003.partial"]
    assert torch.equal(torch.rand(5), expected)


def test_each_rank_has_a_random_state_of_its_own(tmp_path: Path) -> None:
    path = save(FileEngine(), tmp_path, 3)
    others = {"cpu": torch.Generator().manual_seed(5).get_state()}
    torch.save(others, path / "random-state-rank-00001.pt")
    expected = torch.rand(5, generator=torch.Generator().manual_seed(5))
    engine: Any = FileEngine()
    rank_1 = World(rank=1, world_size=1, device=torch.device("cpu"))
    load_checkpoint(engine, path, state(3), state(3), rank_1)
    assert torch.equal(torch.rand(5), expected)
