"""Saves checkpoints behind the back of the training.

A save has three parts. Staging: every rank copies its state to host memory, while the step waits.
Writing: a thread on each rank writes the copy to files aside, hashes them, and syncs them to disk.
Publication: at a later step boundary all ranks agree that all files are written; then rank 0 writes
the manifest, gives the folder its name, and moves `latest`. A rank that dies at any point leaves
the checkpoints before as they were. A save that fails on some rank is dropped by all, told, and the
run goes on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import torch

from tvr.trainer.attempt import Attempt
from tvr.trainer.checkpoint import (
    LATEST,
    SHARDS,
    STEP_PATTERN,
    Retention,
    name_of,
    prune,
)
from tvr.trainer.checkpoint_manifest import FileRecord, SavedState, write_manifest
from tvr.trainer.place import Place
from tvr.trainer.random_state import random_file
from tvr.trainer.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """How a save ended; the same on every rank."""

    step: int
    error: str | None
    """What went wrong, on the lowest rank where something did; none: the checkpoint is there."""
    num_bytes: int
    held_up_s: float
    """How long the step waited for this rank's copy."""
    seconds: float
    """From the start to the publication."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    state: SavedState
    aside: str
    written: Future[dict[str, FileRecord]]
    began: float
    held_up_s: float


class Saver:
    """One run's checkpoints at one place. `save`, `publish` and `finish` are collective."""

    def __init__(
        self,
        place: Place,
        world: World,
        attempt: Attempt,
        retention: Retention,
        *,
        background: bool = True,
    ) -> None:
        self.place = place
        self.attempt = attempt
        self._world = world
        self._retention = retention
        self._background = background
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: _InFlight | None = None
        world.from_first(self._clear)

    def save(self, state: SavedState, stage: Callable[[], Mapping[str, Any]]) -> list[Saved]:
        """Begins a save: `stage` copies this rank's state, by file name. `state.files` is filled.

        Returns how saves ended that this one had to wait for, itself among them without
        `background`.
        """
        ended = self.finish()
        began = time.perf_counter()
        self.attempt.check()
        staged = stage()
        held_up_s = time.perf_counter() - began
        aside = self._aside(state.step)
        self._in_flight = _InFlight(
            state=state,
            aside=aside,
            written=self._thread.submit(_write_files, self.place, aside, staged),
            began=began,
            held_up_s=held_up_s,
        )
        return ended if self._background else ended + self.finish()

    @property
    def is_written(self) -> bool:
        """Whether this rank's files of a save are all written, or will never be."""
        return self._in_flight is not None and self._in_flight.written.done()

    def finish(self) -> list[Saved]:
        """Waits for a save that is in flight, and publishes it."""
        if self._in_flight is None:
            return []
        self._in_flight.written.exception()
        self._world.barrier()
        return [self.publish()]

    def publish(self) -> Saved:
        """Publishes the save in flight, or drops it where it failed on some rank.

        For the boundary at which all ranks know that it `is_written` on all ranks.
        """
        flight = self._in_flight
        assert flight is not None, "nothing is being saved"
        self._in_flight = None
        everyone = self._world.gather_objects(_outcome(flight.written))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(everyone) if error]
        files = {name: record for records, _ in everyone for name, record in records.items()}
        state = replace(flight.state, files=dict(sorted(files.items())))
        error = errors[0] if errors else None
        if error is None:
            error = self._world.from_first(lambda: self._publish(flight.aside, state))
        if error is not None:
            self._world.from_first(lambda: self._drop(flight.aside))
        return Saved(
            step=state.step,
            error=error,
            num_bytes=sum(record.num_bytes for record in files.values()),
            held_up_s=flight.held_up_s,
            seconds=time.perf_counter() - flight.began,
        )

    def _aside(self, step: int) -> str:
        # A store has no rename: there the manifest alone, which comes last, makes a checkpoint.
        if not self.place.is_local:
            return name_of(step)
        return f".{name_of(step)}.attempt-{self.attempt.number}.partial"

    def _publish(self, aside: str, state: SavedState) -> str | None:
        """What went wrong, if anything. Fenced is raised: it ends the run."""
        self.attempt.check()
        name = name_of(state.step)
        try:
            write_manifest(self.place, aside, state)
            if aside != name:
                self.place.remove(name)
                self.place.rename(aside, name)
            self.place.write_whole(LATEST, f"{name}\n".encode())
            prune(self.place, self._retention)
        except OSError as error:
            return f"rank 0: {type(error).__name__}: {error}"
        return None

    def _drop(self, aside: str) -> None:
        self.attempt.check()  # files also vanish because a newer attempt removed them
        try:
            self.place.remove(aside)
        except OSError:
            pass  # the disk that failed; the next attempt clears it

    def _clear(self) -> None:
        """Removes what earlier attempts were writing: it can never become a checkpoint again."""
        for name in self.place.names():
            if name.startswith(".") or (
                STEP_PATTERN.fullmatch(name) and not self._is_published(name)
            ):
                self.place.remove(name)

    def _is_published(self, name: str) -> bool:
        return self.place.is_local or "manifest.json" in self.place.names(name)


def shard_files(staged: Mapping[str, Any], rank: int, random: Any) -> dict[str, Any]:
    """One rank's part of a checkpoint by the names that its files have in there."""
    shards = {f"{SHARDS}/{name}": value for name, value in staged.items()}
    return {**shards, random_file(rank): random}


def _write_files(place: Place, folder: str, staged: Mapping[str, Any]) -> dict[str, FileRecord]:
    records = {}
    for name, value in staged.items():
        with place.writing(f"{folder}/{name}") as file:
            hashing = _Hashing(file)
            torch.save(value, cast(IO[bytes], hashing))
        records[name] = FileRecord(num_bytes=hashing.num_bytes, sha256=hashing.hexdigest())
    return records


def _outcome(written: Future[dict[str, FileRecord]]) -> tuple[dict[str, FileRecord], str | None]:
    error = written.exception()
    if error is not None:
        return {}, f"{type(error).__name__}: {error}"
    return written.result(), None


class _Hashing:
    """A file that knows the sha256 of what was written to it; torch.save writes front to back."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, content: Any) -> int:
        self._digest.update(content)
        written = self._file.write(content)
        self.num_bytes += memoryview(content).nbytes
        return written

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
