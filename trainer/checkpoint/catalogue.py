"""Lists a run's checkpoints, and decides which ones stay.

    checkpoints/step-00000300/attempt-000003-1a2b3c4d-7/shards/   DeepSpeed's files, by rank
                                                        random-rank-00000.pt ...
                              manifest.json     names that folder; written last
                              damaged.json      instead of the manifest: the checkpoint was damaged
                latest        name of the newest checkpoint
                best.json     scores of evaluated steps, and the best of them

Nothing is renamed, so that disks and object stores are used alike. A checkpoint is complete or
absent: its manifest, which publication.py writes once all files are written, publishes it. A
listing only proposes steps, since a store's may be old; the manifest is read by its name. The
module reads manifests only; verification.py reads and checks whole checkpoints.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.manifest import (
    MANIFEST,
    MISSING_FILE_ERRORS,
    SavedState,
    find_unlisted_files,
    read_manifest,
)
from tvr.trainer.errors import PreflightFailed

LATEST = "latest"
BEST = "best.json"
SHARDS = "shards"
STEP_PATTERN = re.compile(r"step-([0-9]{8,18})")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A published checkpoint."""

    name: str
    state: SavedState

    @property
    def folder(self) -> str:
        """The folder of its files."""
        return self.state.files_folder(self.name)


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


def list_step_folders(storage: StorageFolder) -> list[int]:
    """Steps of the folders that the listing shows, published or not, in rising order."""
    matches = (STEP_PATTERN.fullmatch(name) for name in storage.list_names())
    return sorted(int(match[1]) for match in matches if match)


def list_candidates(storage: StorageFolder) -> list[int]:
    """Steps that may have a checkpoint, in rising order: listed ones, and the one in `latest`."""
    latest = read_latest(storage)
    return sorted({*list_step_folders(storage), *([] if latest is None else [latest])})


def published_steps(storage: StorageFolder) -> list[int]:
    """Steps with a manifest, in rising order.

    Raises:
        PreflightFailed: a manifest cannot be read at the moment.
    """
    found = ((step, *read_state(storage, step)) for step in list_candidates(storage))
    return [step for step, state, lines in found if state is not None or lines]


def newest_checkpoint(storage: StorageFolder) -> Checkpoint | None:
    """The newest checkpoint with a readable manifest; its other files are not verified.

    Raises:
        PreflightFailed: a manifest cannot be read at the moment.
    """
    for step in reversed(list_candidates(storage)):
        state, _ = read_state(storage, step)
        if state is not None:
            return Checkpoint(name=checkpoint_name(step), state=state)
    return None


def read_latest(storage: StorageFolder) -> int | None:
    """The step that `latest` names; None if it is missing, or names none."""
    content = _read_if_exists(storage, LATEST)
    match = STEP_PATTERN.fullmatch((content or b"").decode(errors="replace").strip())
    return int(match[1]) if match else None


def write_latest(storage: StorageFolder, name: str) -> None:
    """Stores the name of the newest checkpoint."""
    storage.write_atomically(LATEST, f"{name}\n".encode())


def best_step(storage: StorageFolder, among: Container[int] | None = None) -> int | None:
    """The step with the best evaluation; the newer one of two equal scores.

    Args:
        among: Steps that count, such as the published ones; None: all evaluated ones.

    Returns:
        None if none of them was evaluated.
    """
    return _best_of({s: v for s, v in read_scores(storage).items() if among is None or s in among})


def record_evaluation(
    storage: StorageFolder, step: int, score: float, test_set: str | None = None
) -> None:
    """Stores the score of a step's evaluation beside those of other steps.

    The scores of all steps stay, since the save of the best step may fail or be damaged: the best
    of those that are there then counts.

    Args:
        test_set: Digest of the test set. Scores of another set do not compare, and are dropped.
    """
    _write_scores(storage, {**read_scores(storage, test_set), step: score}, test_set)


def forget_later_scores(storage: StorageFolder, step: int) -> None:
    """Drops the scores of steps after `step`, which are trained anew."""
    scores, test_set = _read_best(storage)
    kept = {saved: score for saved, score in scores.items() if saved <= step}
    if len(kept) < len(scores):
        _write_scores(storage, kept, test_set)


def _write_scores(storage: StorageFolder, scores: Mapping[int, float], test: str | None) -> None:
    best = _best_of(scores)
    content = {"step": best, "score": None if best is None else scores[best], "scores": scores}
    storage.write_atomically(BEST, (json.dumps({**content, "test": test}) + "\n").encode())


def read_state(storage: StorageFolder, step: int) -> tuple[SavedState | None, list[str]]:
    """Reads the manifest of a step's checkpoint.

    Returns:
        The state, or None if there is no manifest, or a damaged one; and a line for each error,
        among them files that the manifest does not list.

    Raises:
        PreflightFailed: the manifest cannot be read at the moment.
    """
    name = checkpoint_name(step)
    try:
        state = read_manifest(storage, name)
        return state, find_unlisted_files(storage, name, state, SHARDS)
    except MISSING_FILE_ERRORS:
        return None, []
    except ValueError as error:
        return None, [str(error)]
    except OSError as error:
        raise_if_unreadable(storage, name, [f"{type(error).__name__}: {error}"])
        raise


def lost_manifest(storage: StorageFolder, step: int) -> str:
    """The line for a checkpoint that `latest` names although it has no manifest."""
    path = storage.path(f"{checkpoint_name(step)}/{MANIFEST}")
    return f"{path}: missing, although {storage.path(LATEST)} names this checkpoint"


def raise_if_unreadable(storage: StorageFolder, name: str, errors: Sequence[str | None]) -> None:
    """Raises PreflightFailed if `errors`, one entry a rank, holds a transient read error.

    The run must not fall back to an older checkpoint because of a transient error.
    """
    found = [(rank, error) for rank, error in enumerate(errors) if error is not None]
    if found:
        path = storage.path(name)
        lines = [f"rank {rank}: {path} cannot be read now: {error}" for rank, error in found]
        raise PreflightFailed(lines, found[0][0])


def read_scores(storage: StorageFolder, test_set: str | None = None) -> dict[int, float]:
    """Scores of the evaluations of saved steps, by step.

    Args:
        test_set: Digest of the test set that counts; None: whichever was used last.
    """
    scores, recorded = _read_best(storage)
    is_other = test_set is not None and recorded is not None and recorded != test_set
    return {} if is_other else scores


def _read_best(storage: StorageFolder) -> tuple[dict[int, float], str | None]:
    """The scores by step, and the digest of their test set; None if it is not recorded."""
    content = _read_if_exists(storage, BEST)
    if content is None:
        return {}, None
    try:
        fields = json.loads(content)
        # Earlier releases recorded the best step alone.
        scores = fields.get("scores", {fields["step"]: fields["score"]})
        found = {int(step): float(score) for step, score in scores.items()}
        if not all(map(math.isfinite, found.values())):
            raise ValueError("a score is not finite")
        test_set = fields.get("test")
        return found, test_set if isinstance(test_set, str) else None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        log.warning("%s is damaged, the next evaluation counts as the best: %r", BEST, error)
        return {}, None


def _best_of(scores: Mapping[int, float]) -> int | None:
    return max(scores, key=lambda step: (scores[step], step), default=None)


def _read_if_exists(storage: StorageFolder, name: str) -> bytes | None:
    try:
        return storage.read(name)
    except MISSING_FILE_ERRORS:
        return None
