"""Saves checkpoints in the background while training continues.

A save has three stages:

1. Staging: every rank copies its state to host memory while the training step waits.
2. Writing: a thread on each rank writes the copy under its final names, in a folder that this save
   alone uses, hashes the files and syncs them to disk.
3. Publication: at a later step boundary all ranks agree that all files are written. Rank 0's
   thread then writes the manifest, updates `latest` and removes old checkpoints (publication.py).
   All ranks learn the result at another step boundary.

A rank that dies during a save leaves the earlier checkpoints intact. If the save fails on one rank,
all ranks discard it, the failure is logged, and training continues.

With `background=False` the step waits for all three stages, and the training tensors are written
without a copy. The saver falls back to this mode, with a warning, if the copies do not fit into the
machine's memory. Every save result records the mode.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.catalogue import SHARDS, Retention, checkpoint_name
from tvr.trainer.checkpoint.file_writer import write_files, write_result, writer_thread
from tvr.trainer.checkpoint.manifest import FileRecord, SavedState
from tvr.trainer.checkpoint.publication import Publisher
from tvr.trainer.checkpoint.verification import CheckpointScan
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.random_state import random_state_file
from tvr.trainer.engine.staging import staging_shortage
from tvr.trainer.fencing import Attempt
from tvr.trainer.records import SaveResult

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _PendingSave:
    """A save that has begun and is not yet published."""

    state: SavedState
    start: float
    written: Future[dict[str, FileRecord]]
    published: Future[str | None] | None = None
    """The error of the publication, which begins once all ranks have written."""
    blocked_s: float = 0.0

    @property
    def stage(self) -> Future[Any]:
        """This rank's work of the current stage."""
        return self.published or self.written

    @contextmanager
    def blocking(self) -> Iterator[None]:
        """Counts the time of the block as time for which the step waits."""
        before = time.perf_counter()
        yield
        self.blocked_s += time.perf_counter() - before


class Saver:
    """Saves one run's checkpoints to one storage.

    `save`, `advance` and `finish` are collective: all ranks call them at the same step.
    """

    def __init__(
        self,
        storage: StorageFolder,
        world: World,
        attempt: Attempt,
        retention: Retention,
        *,
        background: bool = True,
    ) -> None:
        self.storage = storage
        self.attempt = attempt
        self._world = world
        self._publisher = Publisher(storage, attempt, retention)
        self._background = background
        self._is_memory_checked = False
        self._no_room: str | None = None
        self._thread = writer_thread(low_priority=False)
        self._pending: _PendingSave | None = None
        self.last: SaveResult | None = None
        """The result of the last finished save."""
        # Two runs that share a storage by mistake may have equal attempt numbers.
        self._token = world.run_on_first(lambda: secrets.token_hex(4))
        self._num_saves = 0
        world.run_on_first(self._publisher.begin)

    def set_aside_damaged(self, scan: CheckpointScan) -> None:
        """Takes the damaged checkpoints of a scan out of use, see `Publisher.set_aside`.

        All ranks call it.
        """
        newest = scan.newest
        if newest is not None and scan.damaged:
            self._world.run_on_first(
                lambda: self._publisher.set_aside(scan.damaged, newest.state.step)
            )

    def save(
        self,
        state: SavedState,
        stage: Callable[[bool], Mapping[str, Any]],
        *,
        is_last: bool = False,
    ) -> list[SaveResult]:
        """Starts a save, after an unfinished one has ended.

        Args:
            state: Written to the manifest; `folder` and `files` are filled in.
            stage: Returns this rank's state by file name; copies the tensors if called with True.
            is_last: True if no training step follows, so that the thread keeps its priority.

        Returns:
            Results of the saves that have ended: the one before, and without `background` this one.

        Raises:
            Fenced: a newer attempt at the run has begun.
        """
        results = self.finish()
        start = time.perf_counter()
        self.attempt.check()
        copy = self._copies(stage)
        staged = stage(copy)
        # Each save starts a thread, since a thread cannot raise its own priority again.
        self._thread.shutdown()
        self._thread = writer_thread(low_priority=copy and not is_last)
        state = replace(state, folder=self._next_folder())
        folder = state.files_folder(checkpoint_name(state.step))
        self._pending = _PendingSave(
            state=state,
            start=start,
            written=self._thread.submit(write_files, self.storage, folder, staged),
            blocked_s=time.perf_counter() - start,
        )
        return results if self._background else results + self.finish()

    @property
    def is_ready(self) -> bool:
        """True if a save is pending and this rank has finished its work of the current stage."""
        return self._pending is not None and self._pending.stage.done()

    def finish(self) -> list[SaveResult]:
        """Waits for a pending save. Returns its result, or an empty list if none is pending."""
        results: list[SaveResult] = []
        while self._pending is not None:
            with self._pending.blocking():
                wait([self._pending.stage])
            results += self.advance()
        return results

    def advance(self) -> list[SaveResult]:
        """Moves the pending save to its next stage; call it once all ranks are ready.

        Returns:
            The result of the save if it has ended, otherwise an empty list.

        Raises:
            Fenced: a newer attempt at the run has begun.
        """
        pending = self._pending
        assert pending is not None, "no save is pending"
        with pending.blocking():
            if pending.published is None:
                pending.published = self._start_publication(pending)
                return []
            error = self._world.run_on_first(pending.published.result)
        self._pending = None
        self.last = SaveResult(
            step=pending.state.step,
            error=error,
            num_bytes=sum(record.num_bytes for record in pending.state.files.values()),
            blocked_s=pending.blocked_s,
            seconds=time.perf_counter() - pending.start,
            background=self._background,
            no_room=self._no_room,
        )
        return [self.last]

    def _copies(self, stage: Callable[[bool], Mapping[str, Any]]) -> bool:
        """Whether to copy the state. The first call checks that the copy fits into memory."""
        if self._background and not self._is_memory_checked:
            self._is_memory_checked = True
            self._no_room = staging_shortage(stage(False), self._world)
            if self._no_room is not None:
                self._background = False
                if self._world.is_first:
                    log.warning("checkpoints are not written in the background: %s", self._no_room)
        return self._background

    def _start_publication(self, pending: _PendingSave) -> Future[str | None]:
        """Collects all ranks' records, and publishes or discards the files on rank 0's thread."""
        results = self._world.all_gather_objects(write_result(pending.written))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(results) if error]
        files = {name: record for records, _ in results for name, record in records.items()}
        pending.state = replace(pending.state, files=dict(sorted(files.items())))
        error = errors[0] if errors else None
        if self._world.is_first:
            return self._thread.submit(self._publish_or_discard, pending.state, error)
        done: Future[str | None] = Future()
        done.set_result(None)
        return done

    def _next_folder(self) -> str:
        """The folder, within the step's, that the next save alone writes to; equal on all ranks."""
        self._num_saves += 1
        return f"attempt-{self.attempt.number:06d}-{self._token}-{self._num_saves}"

    def _publish_or_discard(self, state: SavedState, error: str | None) -> str | None:
        """Publishes written files, or removes them if a rank failed. Returns the error."""
        if error is None:
            try:
                self._publisher.publish(state)
            except OSError as caught:
                error = f"rank 0: {type(caught).__name__}: {caught}"
        if error is not None:
            self._publisher.discard(state.step)
        return error


def rank_files(staged: Mapping[str, Any], rank: int, random: Any) -> dict[str, Any]:
    """One rank's part of a checkpoint: its staged state and random state, by file name.

    Args:
        staged: DeepSpeed's state by file name.
        random: State of the random number generators, as `random_state` returns it.
    """
    shards = {f"{SHARDS}/{name}": value for name, value in staged.items()}
    return {**shards, random_state_file(rank): random}
