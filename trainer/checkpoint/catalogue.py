"""Lists a run's checkpoints, decides which ones stay, and removes the others.

    checkpoints/step-00000300/shards/     DeepSpeed's files: weights and optimiser, by rank
                              random-rank-00000.pt ...
                              manifest.json             written last; marks a complete checkpoint
                latest        name of the newest checkpoint, for people and scripts
                best.json     step with the best evaluation

A checkpoint is complete or absent: saver.py publishes it only once all its files are written. The
module reads manifests only; verification.py reads and checks whole checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.manifest import (
    MISSING_FILE_ERRORS,
    SavedState,
    find_unlisted_files,
    read_manifest,
)
from tvr.trainer.errors import PreflightFailed

LATEST = "latest"
BEST = "best.json"
SHARDS = "shards"
STEP_PATTERN = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A published checkpoint."""

    name: str
    state: SavedState


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Rule for the checkpoints that stay: the newest, one every n steps, and the best."""

    last: int = 2
    every: int = 0
    """Steps; 0: no checkpoint stays for its step alone."""
    best: bool = False

    def expired_steps(self, steps: Iterable[int], best_step: int | None) -> list[int]:
        """Steps whose checkpoints can be removed, in rising order."""
        ordered = sorted(steps)
        kept = set(ordered[-self.last :])
        if self.every:
            kept |= {step for step in ordered if step % self.every == 0}
        if self.best and best_step is not None:
            kept.add(best_step)
        return [step for step in ordered if step not in kept]


def checkpoint_name(step: int) -> str:
    """Name of the folder with a step's checkpoint."""
    return f"step-{step:08d}"


def list_steps(storage: StorageFolder) -> list[int]:
    """Steps of all folders that have a checkpoint's name, in rising order."""
    matches = (STEP_PATTERN.fullmatch(name) for name in storage.list_names())
    return sorted(int(match[1]) for match in matches if match)


def newest_checkpoint(storage: StorageFolder) -> Checkpoint | None:
    """The newest checkpoint with a readable manifest; its other files are not verified.

    Raises:
        PreflightFailed: a manifest cannot be read at the moment.
    """
    for step in reversed(list_steps(storage)):
        state, _ = read_state(storage, checkpoint_name(step))
        if state is not None:
            return Checkpoint(name=checkpoint_name(step), state=state)
    return None


def best_step(storage: StorageFolder) -> int | None:
    """The step with the best evaluation so far; None before the first evaluation."""
    return _best(storage)[0]


def record_evaluation(storage: StorageFolder, step: int, score: float) -> None:
    """Stores the step and score of an evaluation if no earlier one scored higher."""
    best_score = _best(storage)[1]
    if best_score is None or score >= best_score:
        content = json.dumps({"step": step, "score": score}) + "\n"
        storage.write_atomically(BEST, content.encode())


def prune(storage: StorageFolder, retention: Retention) -> None:
    """Removes the checkpoints that `retention` does not keep."""
    best = best_step(storage) if retention.best else None
    for step in retention.expired_steps(list_steps(storage), best):
        storage.remove(checkpoint_name(step))


def read_state(storage: StorageFolder, name: str) -> tuple[SavedState | None, list[str]]:
    """Reads a checkpoint's manifest.

    Returns:
        The state, or None if the manifest is missing or damaged; and a line for each error, among
        them files that the manifest does not list.

    Raises:
        PreflightFailed: the manifest cannot be read at the moment.
    """
    try:
        state = read_manifest(storage, name)
        return state, find_unlisted_files(storage, name, state, SHARDS)
    except (ValueError, *MISSING_FILE_ERRORS) as error:
        return None, [str(error)]
    except OSError as error:
        raise_if_unreadable(storage, name, [f"{type(error).__name__}: {error}"])
        raise


def raise_if_unreadable(storage: StorageFolder, name: str, errors: Sequence[str | None]) -> None:
    """Raises PreflightFailed if `errors`, one entry a rank, holds a transient read error.

    The run must not fall back to an older checkpoint because of a transient error.
    """
    found = [(rank, error) for rank, error in enumerate(errors) if error is not None]
    if found:
        path = storage.path(name)
        lines = [f"rank {rank}: {path} cannot be read now: {error}" for rank, error in found]
        raise PreflightFailed(lines, found[0][0])


def _best(storage: StorageFolder) -> tuple[int | None, float | None]:
    """Step and score of the best evaluation."""
    if BEST not in storage.list_names():
        return None, None
    fields = json.loads(storage.read(BEST))
    return fields["step"], fields["score"]
