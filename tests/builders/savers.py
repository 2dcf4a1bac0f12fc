"""Savers of a single rank, and small states for them to save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.catalogue import Retention
from tvr.trainer.checkpoint.manifest import SavedState
from tvr.trainer.checkpoint.saver import Saver, rank_files
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.random_state import get_random_state
from tvr.trainer.fencing import begin_attempt
from tvr.trainer.records import SaveResult

ALONE = World(rank=0, world_size=1, device=torch.device("cpu"))


def state(step: int, **changes: Any) -> SavedState:
    """A state without files."""
    fields = {"step": step, "world_size": 1, "zero_stage": 1, "precision": "fp32", "attempt": 1}
    return SavedState(**{**fields, "files": {}, **changes})


def saver(folder: Path | str, run_dir: Path, **settings: Any) -> Saver:
    """A saver of the run's next attempt."""
    retention = settings.pop("retention", Retention())
    settings.setdefault("background", False)
    return Saver(StorageFolder(str(folder)), ALONE, begin_attempt(run_dir), retention, **settings)


def stage(value: float) -> dict[str, Any]:
    """The files of a rank; the model's weight holds `value`."""
    shards = {"model.pt": {"weight": torch.full((1000,), value)}, "optimiser.pt": {"step": value}}
    return rank_files(shards, 0, get_random_state())


def save(to: Saver, step: int) -> SaveResult:
    """Saves a step; the weight holds its number."""
    (saved,) = to.save(state(step), lambda copy: stage(float(step)))
    return saved


def wait_until_ready(writer: Saver) -> None:
    """Waits until the pending save has ended its stage."""
    while not writer.is_ready:
        pass
