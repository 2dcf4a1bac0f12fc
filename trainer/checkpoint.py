"""Sharded checkpoints: one folder a step, written aside by all ranks, renamed when whole."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tvr.trainer.engine import Engine
from tvr.trainer.errors import CheckpointIncompatible
from tvr.trainer.world import World

STATE = "state.json"
LATEST = "latest"
KEPT = 2  # the newest and the one before


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """What a checkpoint says of itself. The position in the data follows from `step`."""

    step: int
    world_size: int
    zero_stage: int


def save_checkpoint(engine: Engine, folder: Path, state: SavedState, world: World) -> Path:
    """Writes folder/step-N with all ranks' shards and random states, then moves `latest` to it.

    Under its name a checkpoint is complete: it is renamed after every rank has written its part.
    """
    name = f"step-{state.step:08d}"
    aside, final = folder / f".{name}.partial", folder / name
    world.from_first(lambda: _make_room(folder, aside, name))
    engine.save(folder, aside.name, {})
    torch.save(_random_state(), aside / _random_file(world.rank))
    world.barrier()
    world.from_first(lambda: _publish(folder, aside, final, state))
    return final


def latest_checkpoint(folder: Path) -> tuple[Path, SavedState] | None:
    """The newest complete checkpoint, or none.

    Raises:
        CheckpointIncompatible: if `latest` names a folder that is gone or unreadable.
    """
    if not (folder / LATEST).exists():
        return None
    path = folder / (folder / LATEST).read_text().strip()
    try:
        return path, SavedState(**json.loads((path / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointIncompatible(
            f"{folder / LATEST} names {path.name}, which cannot be read: {error}"
        ) from None


def load_checkpoint(
    engine: Engine, path: Path, saved: SavedState, mine: SavedState, world: World
) -> None:
    """Restores weights, optimiser and random state of this rank.

    Raises:
        CheckpointIncompatible: saved by another number of ranks or at another ZeRO stage.
    """
    for name in ("world_size", "zero_stage"):
        was, now = getattr(saved, name), getattr(mine, name)
        if was != now:
            raise CheckpointIncompatible(
                f"{path} was saved with {name}={was}, this run has {name}={now}; "
                f"continue with {was}"
            )
    engine.load(path.parent, path.name)
    _restore_random_state(torch.load(path / _random_file(world.rank), weights_only=True))


def _make_room(folder: Path, aside: Path, name: str) -> None:
    """Removes what an earlier attempt left of this step or beyond it: none of it is `latest`."""
    for leftover in (aside, *(path for path in folder.glob("step-*") if path.name >= name)):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)


def _publish(folder: Path, aside: Path, final: Path, state: SavedState) -> None:
    (aside / STATE).write_text(json.dumps(asdict(state)) + "\n")
    aside.rename(final)
    pointer = folder / f".{LATEST}.partial"
    pointer.write_text(final.name + "\n")
    os.replace(pointer, folder / LATEST)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def _random_file(rank: int) -> str:
    return f"random-state-rank-{rank:05d}.pt"


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
