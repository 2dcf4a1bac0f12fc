"""Saves checkpoints behind the back of the training.

A save has three parts. Staging: every rank copies its state to host memory, while the step waits.
Writing: a thread on each rank writes the copy to files aside, hashes them, and syncs them to disk.
Publication: at a later step boundary all ranks agree that all files are written; then rank 0's
thread writes the manifest, gives the folder its name, moves `latest`, and removes old checkpoints,
of which all hear at a step boundary once more. A rank that dies at any point leaves the checkpoints
before as they were. A save that fails on some rank is dropped by all, told, and the run goes on.

Without `background` the step waits for all three parts, and nothing is copied: the training's own
tensors are written. So it is, with a warning, where the copies do not fit the machine's memory;
every save tells how it was made.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import torch

from tvr.trainer.checkpoint.catalogue import (
    LATEST,
    SHARDS,
    STEP_PATTERN,
    Retention,
    name_of,
    prune,
)
from tvr.trainer.checkpoint.manifest import MANIFEST, FileRecord, SavedState, write_manifest
from tvr.trainer.checkpoint.place import Place
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.random_state import random_state_file
from tvr.trainer.engine.staging import staging_shortage
from tvr.trainer.fencing import Attempt

# Of the thread that writes beside the training: where all cores are taken it gets a tenth of one,
# and steps do not wait for it. At 0 it lengthened steps by more than a synchronous save takes.
NICENESS = 10

# The folders that saving and removing make on a local disk; whatever else is hidden is not ours.
ASIDE = re.compile(r"\.+(damaged-)?step-\d{8,}(\.attempt-\d+\.partial)?(\.trash-\d+)*")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """How a save ended; the same on every rank."""

    step: int
    error: str | None
    """What went wrong, on the lowest rank where something did; none: the checkpoint is there."""
    num_bytes: int
    held_up_s: float
    """How long steps waited on this rank: for its copy, and for the ranks to agree; without
    `background` for all of it."""
    seconds: float
    """From the start to the publication."""
    background: bool
    """Whether it was a copy that was written, beside the training."""
    no_room: str | None = None
    """Why there was no copy though there should have been one."""


@dataclass(slots=True, kw_only=True)
class _InFlight:
    state: SavedState
    aside: str
    began: float
    written: Future[dict[str, FileRecord]]
    published: Future[str | None] | None = None
    """Begun once all ranks have written."""
    held_up_s: float = 0.0

    @property
    def part(self) -> Future[Any]:
        return self.published or self.written

    @contextmanager
    def holding_up(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.held_up_s += time.perf_counter() - before


class Saver:
    """One run's checkpoints at one place. `save`, `go_on` and `finish` are collective."""

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
        self._is_sized = False
        self._no_room: str | None = None
        self._thread = _writer(gives_way=False)
        self._in_flight: _InFlight | None = None
        self.last: Saved | None = None
        """How the newest save that has ended did so."""
        world.run_on_first(self._clear)

    def save(
        self,
        state: SavedState,
        stage: Callable[[bool], Mapping[str, Any]],
        *,
        is_last: bool = False,
    ) -> list[Saved]:
        """Begins a save: `stage` gives this rank's state by file name, copied where it is told so.
        `state.files` is filled. After the last one no step follows to which it would give way.

        Returns how saves ended that this one had to wait for, itself among them without
        `background`.
        """
        ended = self.finish()
        began = time.perf_counter()
        self.attempt.check()
        copies = self._copies(stage)
        staged = stage(copies)
        # A thread for each save: one that has given way cannot take that back.
        self._thread.shutdown()
        self._thread = _writer(gives_way=copies and not is_last)
        aside = self._aside(state.step)
        self._in_flight = _InFlight(
            state=state,
            aside=aside,
            began=began,
            written=self._thread.submit(_write_files, self.place, aside, staged),
            held_up_s=time.perf_counter() - began,
        )
        return ended if self._background else ended + self.finish()

    @property
    def is_ready(self) -> bool:
        """Whether a save can `go_on` as far as this rank knows: its part of the work is done."""
        return self._in_flight is not None and self._in_flight.part.done()

    def finish(self) -> list[Saved]:
        """Waits for a save that is in flight."""
        ended: list[Saved] = []
        while self._in_flight is not None:
            with self._in_flight.holding_up():
                wait([self._in_flight.part])
            ended += self.go_on()
        return ended

    def go_on(self) -> list[Saved]:
        """For a boundary at which all ranks know that the save `is_ready` on all ranks: begins its
        publication, or tells how it ended."""
        flight = self._in_flight
        assert flight is not None, "nothing is being saved"
        with flight.holding_up():
            if flight.published is None:
                flight.published = self._publication(flight)
                return []
            # What is raised here, Fenced, ends the run.
            error = self._world.run_on_first(flight.published.result)
        self._in_flight = None
        self.last = Saved(
            step=flight.state.step,
            error=error,
            num_bytes=sum(record.num_bytes for record in flight.state.files.values()),
            held_up_s=flight.held_up_s,
            seconds=time.perf_counter() - flight.began,
            background=self._background,
            no_room=self._no_room,
        )
        return [self.last]

    def _copies(self, stage: Callable[[bool], Mapping[str, Any]]) -> bool:
        if self._background and not self._is_sized:
            self._is_sized = True
            self._no_room = staging_shortage(stage(False), self._world)
            if self._no_room is not None:
                self._background = False
                if self._world.is_first:
                    log.warning("checkpoints are not written in the background: %s", self._no_room)
        return self._background

    def _publication(self, flight: _InFlight) -> Future[str | None]:
        """Of what all ranks have written, or its end where one of them has not."""
        everyone = self._world.all_gather_objects(_outcome(flight.written))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(everyone) if error]
        files = {name: record for records, _ in everyone for name, record in records.items()}
        flight.state = replace(flight.state, files=dict(sorted(files.items())))
        error = errors[0] if errors else None
        if self._world.is_first:
            return self._thread.submit(self._publish, flight.aside, flight.state, error)
        done: Future[str | None] = Future()
        done.set_result(None)
        return done

    def _aside(self, step: int) -> str:
        # A store has no rename: there the manifest alone, which comes last, makes a checkpoint.
        if not self.place.is_local:
            return name_of(step)
        return f".{name_of(step)}.attempt-{self.attempt.number}.partial"

    def _publish(self, aside: str, state: SavedState, error: str | None) -> str | None:
        """What went wrong, if anything; then nothing is left of it. Raises Fenced."""
        error = error or self._published(aside, state)
        if error is not None:
            self._drop(aside)
        return error

    def _published(self, aside: str, state: SavedState) -> str | None:
        self.attempt.check()
        name = name_of(state.step)
        try:
            write_manifest(self.place, aside, state)
            if aside != name:
                self.place.remove(name)
                self.place.rename(aside, name)
        except OSError as error:
            return f"rank 0: {type(error).__name__}: {error}"
        try:
            self.place.write_whole(LATEST, f"{name}\n".encode())
            prune(self.place, self._retention)
        except OSError as error:
            # The checkpoint is there; what need not stay is tried again after the next one.
            log.warning("%s is saved, and what it replaces stays: %s", name, error)
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
            if ASIDE.fullmatch(name) or (
                STEP_PATTERN.fullmatch(name) and not self._is_published(name)
            ):
                self.place.remove(name)

    def _is_published(self, name: str) -> bool:
        return self.place.is_local or MANIFEST in self.place.names(name)


def shard_files(staged: Mapping[str, Any], rank: int, random: Any) -> dict[str, Any]:
    """One rank's part of a checkpoint by the names that its files have in there."""
    shards = {f"{SHARDS}/{name}": value for name, value in staged.items()}
    return {**shards, random_state_file(rank): random}


def _writer(*, gives_way: bool) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        max_workers=1,
        thread_name_prefix="checkpoint",
        initializer=_give_way if gives_way else None,
    )


def _give_way() -> None:
    # On Linux a thread has a niceness of its own, by its id, and only the superuser lowers one.
    thread = threading.get_native_id()
    niceness = max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread))
    os.setpriority(os.PRIO_PROCESS, thread, niceness)


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
        cause = _first(error)
        return {}, f"{type(cause).__name__}: {cause}"
    return written.result(), None


def _first(error: BaseException) -> BaseException:
    """What torch's writer met, which as it closes its file complains of a wrong position."""
    while error.__context__ is not None:
        error = error.__context__
    return error


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
