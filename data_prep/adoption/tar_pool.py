"""Indexes archives in several processes.

A process that dies, or exceeds its limits, costs the video that it decoded and not the archive: a
new process goes on with what is known of the archive. It knows that from a journal, a local file
to which the process writes what it does.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tvr.data_prep.adoption.index_tar import ForeignTar, KnownSamples, Watcher, index_tar
from tvr.data_prep.dataset.foreign_samples import ForeignRules
from tvr.data_prep.limited_process import (
    NOTHING_YET,
    Alive,
    LimitedProcess,
    ProcessLimits,
    TaskFailure,
    Work,
)
from tvr.data_prep.packing.shard_record import ShardRecord
from tvr.data_prep.storage.storage import Storage, StorageUnavailable

# Failures at one video before it is given up.
TRIES = 2

Indexed = tuple[ForeignTar, ShardRecord]

log = logging.getLogger(__name__)


def index_tars(
    url: str,
    tars: Sequence[ForeignTar],
    rules: ForeignRules,
    processes: int,
    limits: ProcessLimits | None = None,
) -> Iterator[Indexed]:
    """Yields the record of each archive, as they are done.

    Args:
        processes: 0 means the calling process, which has no limits.

    Raises:
        ValueError: an archive changes while it is read.
        OSError: the storage fails; StorageUnavailable if only for the moment.
        ChildProcessError: processes end before they decode a video.
        RuntimeError: another exception in a process; the message holds its traceback.
    """
    if processes == 0:
        for tar in tars:
            yield tar, index_tar(Storage(url), tar, rules, KnownSamples(), Watcher())
        return
    limits = limits or ProcessLimits()
    processes = max(1, min(processes, len(tars)))
    memory_bytes = limits.memory_of(processes)
    queue = deque(tars)
    with tempfile.TemporaryDirectory(prefix="tvr-adopt-") as folder:
        workers = [
            TarWorker(url, rules, limits, memory_bytes, Path(folder) / f"{number}.journal")
            for number in range(processes)
        ]
        try:
            while queue or any(worker.tar for worker in workers):
                for worker in workers:
                    if worker.tar is None and queue:
                        worker.submit(queue.popleft())
                yield from _receive_from([worker for worker in workers if worker.tar])
        finally:
            for worker in workers:
                worker.process.stop()


def _receive_from(busy: list[TarWorker]) -> Iterator[Indexed]:
    """Yields what the processes have sent, and ends those that exceed their time."""
    by_connection = {worker.process.connection: worker for worker in busy}
    first_s = min(worker.process.deadline_s for worker in busy)
    for connection in wait(list(by_connection), max(0.0, first_s - time.monotonic())):
        done = by_connection.pop(connection).receive()  # type: ignore[arg-type]
        if done is not None:
            yield done
    now_s = time.monotonic()
    for worker in by_connection.values():
        worker.expire(now_s)


class TarWorker:
    """A process that indexes one archive at a time.

    Args:
        url: Folder of the archives.
        rules: How samples are read.
        limits: Of each video.
        memory_bytes: Memory of the process.
        journal: File of the process's notes.
    """

    def __init__(
        self,
        url: str,
        rules: ForeignRules,
        limits: ProcessLimits,
        memory_bytes: int,
        journal: Path,
    ) -> None:
        self._journal = journal
        self._job = _Job()
        self.tar: ForeignTar | None = None
        """Archive that is being indexed."""
        self.process = LimitedProcess(_tar_indexer, (url, rules), limits, memory_bytes)

    def submit(self, tar: ForeignTar) -> None:
        """Sends an archive to the idle process."""
        self.tar, self._job = tar, _Job()
        self._begin()

    def receive(self) -> Indexed | None:
        """Receives a sign of progress, the end of the process, or the archive's record.

        Raises as `index_tars`.
        """
        assert self.tar is not None, "an archive was submitted"
        try:
            result = self.process.receive()
        except RuntimeError as error:
            raise RuntimeError(f"indexing {self.tar.name} raised:\n{error}") from error
        if isinstance(result, Exception):
            raise result
        if isinstance(result, ShardRecord):
            tar, self.tar = self.tar, None
            return tar, result
        if isinstance(result, TaskFailure):
            self._fail(result)
        else:
            assert result is NOTHING_YET, "a process sends nothing else"
        return None

    def expire(self, now_s: float) -> None:
        """Ends a process that exceeds its time."""
        failure = self.process.expire(now_s)
        if failure is not None:
            self._fail(failure)

    def _begin(self) -> None:
        self._journal.write_bytes(b"")
        self.process.submit((self.tar, self._job.known, self._journal))

    def _fail(self, failure: TaskFailure) -> None:
        """Goes on with the archive, after a second failure without the video."""
        assert self.tar is not None, "an idle process does not fail"
        known, begun = self._job.known, None
        for line in self._journal.read_text().splitlines():
            offset, what = line.split()
            begun = int(offset) if what == "begin" else None
            if what == "passed":
                known.passed.add(int(offset))
        self._job.failures[begun] += 1
        where = self.tar.name if begun is None else f"{self.tar.name}, byte {begun}"
        log.warning("a process %s at %s; a new one goes on", failure.how, where)
        if self._job.failures[begun] >= TRIES:
            if begun is None:
                raise ChildProcessError(
                    f"a process {failure.how} at {where}, for the second time; archives that are"
                    " done are kept: repeat the command to resume"
                )
            known.refused[begun] = failure.reason, f"twice, its process {failure.how}"
        self._begin()


@dataclass(slots=True)
class _Job:
    """What happened to an archive so far."""

    known: KnownSamples = field(default_factory=KnownSamples)
    failures: Counter[int | None] = field(default_factory=Counter)
    """Failures by the offset of the sample whose video was decoded; None = no video."""


class _Journal(Watcher):
    def __init__(self, path: Path, alive: Alive) -> None:
        self._file = open(path, "ab", buffering=0)
        self._alive = alive

    def read(self) -> None:
        self._alive(0)

    def begin(self, offset: int, num_bytes: int) -> None:
        self._file.write(b"%d begin\n" % offset)
        self._alive(num_bytes)

    def passed(self, offset: int) -> None:
        self._file.write(b"%d passed\n" % offset)
        self._alive(0)

    def refused(self, offset: int) -> None:
        self._file.write(b"%d refused\n" % offset)
        self._alive(0)

    def close(self) -> None:
        self._file.close()


def _tar_indexer(url: str, rules: ForeignRules) -> Work:
    """Returns the work of a process."""
    store = Storage(url)

    def index(task: Any, alive: Alive) -> Any:
        tar, known, path = task
        journal = _Journal(path, alive)
        try:
            return index_tar(store, tar, rules, known, journal)
        except StorageUnavailable:
            raise
        except OSError as error:
            return OSError(f"{tar.name}: {type(error).__name__}: {error}")
        except ValueError as error:
            return ValueError(str(error))
        finally:
            journal.close()

    return index
