"""Which checkpoints there are, which one a run goes on from, and which are kept.

    checkpoints/step-00000300/shards/     DeepSpeed's files: weights and optimiser, by rank
                              random-rank-00000.pt ...
                              manifest.json             last; no checkpoint without it
                latest        the name of the newest; for people and scripts
                best.json     the step whose evaluation was best

A checkpoint is complete or absent (saver.py writes it). What is read back is verified against the
manifest before anything is unpickled; one that is damaged is named, and the one before is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tvr.trainer.checkpoint.manifest import (
    GONE,
    SavedState,
    damage,
    read_manifest,
    unlisted,
)
from tvr.trainer.checkpoint.place import Place
from tvr.trainer.distributed.world import World
from tvr.trainer.errors import CheckpointDamaged, PreflightFailed

LATEST = "latest"
BEST = "best.json"
SHARDS = "shards"
STEP_PATTERN = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete one."""

    name: str
    state: SavedState


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a run can go on from, and what it cannot."""

    newest: Checkpoint | None
    damaged: dict[str, tuple[str, ...]]
    """The newer ones that are not whole, by name, and what is wrong with each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which checkpoints stay: the last ones, every n-th step's, and the best one."""

    last: int = 2
    every: int = 0
    """Steps; 0: none."""
    best: bool = False

    def surplus(self, steps: Iterable[int], best_step: int | None) -> list[int]:
        """The steps of the checkpoints that may go."""
        ordered = sorted(steps)
        kept = set(ordered[-self.last :])
        if self.every:
            kept |= {step for step in ordered if step % self.every == 0}
        if self.best and best_step is not None:
            kept.add(best_step)
        return [step for step in ordered if step not in kept]


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def steps_in(place: Place) -> list[int]:
    """The steps of all folders with a checkpoint's name, oldest first."""
    matches = (STEP_PATTERN.fullmatch(name) for name in place.names())
    return sorted(int(match[1]) for match in matches if match)


def newest_whole(place: Place, world: World) -> Found:
    """The newest checkpoint whose every byte is what was written; all ranks share the reading.

    Raises:
        CheckpointDamaged: there are checkpoints, and not one of them is whole.
        PreflightFailed: whether one is whole cannot be known, since its place cannot be read now.
    """
    damaged: dict[str, tuple[str, ...]] = {}
    for step in reversed(world.run_on_first(lambda: steps_in(place))):
        name = name_of(step)
        state, lines = world.run_on_first(lambda name=name: _state(place, name))
        if state is not None:
            mine = sorted(state.files)[world.rank :: world.world_size]
            found = world.all_gather_objects(_seen(place, name, state, mine))
            _refuse_unreadable(place, name, [error for _, error in found])
            lines += [line for part, _ in found for line in part]
            if not lines:
                return Found(newest=Checkpoint(name=name, state=state), damaged=damaged)
        damaged[name] = tuple(lines)
    if damaged:
        said = "; ".join(line for lines in damaged.values() for line in lines)
        raise CheckpointDamaged(
            f"{place.url}: no checkpoint is whole: {said}. Restore one of them, or train in another"
            " folder"
        )
    return Found(newest=None, damaged={})


def set_aside(place: Place, found: Found) -> None:
    """Gives damaged checkpoints another name, so that they count as none; they stay to be looked
    at."""
    for name in found.damaged:
        place.remove(f"damaged-{name}")
        place.rename(name, f"damaged-{name}")


def newest(place: Place) -> Checkpoint | None:
    """The newest checkpoint with a readable manifest; its other files are not looked at."""
    for step in reversed(steps_in(place)):
        state, _ = _state(place, name_of(step))
        if state is not None:
            return Checkpoint(name=name_of(step), state=state)
    return None


def best_step(place: Place) -> int | None:
    """The step whose evaluation was best so far."""
    return _best(place)[0]


def note_evaluation(place: Place, step: int, score: float) -> None:
    """Remembers the step of the best score; the newer one of two equal ones."""
    before = _best(place)[1]
    if before is None or score >= before:
        place.write_whole(BEST, (json.dumps({"step": step, "score": score}) + "\n").encode())


def prune(place: Place, retention: Retention) -> None:
    """Removes what need not stay."""
    for step in retention.surplus(steps_in(place), best_step(place) if retention.best else None):
        place.remove(name_of(step))


def _best(place: Place) -> tuple[int | None, float | None]:
    if BEST not in place.names():
        return None, None
    fields = json.loads(place.read(BEST))
    return fields["step"], fields["score"]


def _state(place: Place, name: str) -> tuple[SavedState | None, list[str]]:
    """What the manifest says, or what is wrong with it; and with what it does not list."""
    try:
        state = read_manifest(place, name)
        return state, unlisted(place, name, state, SHARDS)
    except (ValueError, *GONE) as error:
        return None, [str(error)]
    except OSError as error:
        _refuse_unreadable(place, name, [f"{type(error).__name__}: {error}"])
        raise


def _seen(
    place: Place, name: str, state: SavedState, files: Iterable[str]
) -> tuple[list[str], str | None]:
    """What is wrong with files, or why that cannot be known."""
    try:
        return damage(place, name, state, files), None
    except OSError as error:
        return [], f"{type(error).__name__}: {error}"


def _refuse_unreadable(place: Place, name: str, errors: Sequence[str | None]) -> None:
    """A checkpoint that cannot be read at the moment is not given up for an older one."""
    found = [(rank, error) for rank, error in enumerate(errors) if error is not None]
    if found:
        where = place.path(name)
        lines = [f"rank {rank}: {where} cannot be read now: {error}" for rank, error in found]
        raise PreflightFailed(lines, found[0][0])
