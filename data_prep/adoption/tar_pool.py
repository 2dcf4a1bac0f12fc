"""Indexes archives in several processes.

A process that dies or hangs costs the video that it decoded, not the archive: a new process goes
on with what is known of the archive. Each process has its own pipe, see `worker_pool`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait

from tvr.data_prep.adoption.index_tar import ForeignTar, KnownSamples, index_tar
from tvr.data_prep.dataset.foreign_samples import ForeignRules
from tvr.data_prep.packing.shard_record import ShardRecord
from tvr.data_prep.storage.storage import Storage, StorageUnavailable

# To decode one video. Its bytes are in memory by then.
DECODE_LIMIT_S = 600.0
POLL_S = 1.0
# Ends of a process in one place before it is given up.
MAX_DEATHS = 2

log = logging.getLogger(__name__)


def index_tars(
    url: str,
    tars: Sequence[ForeignTar],
    rules: ForeignRules,
    processes: int,
    decode_limit_s: float = DECODE_LIMIT_S,
) -> Iterator[tuple[ForeignTar, ShardRecord]]:
    """Yields the record of each archive, as they are done.

    Raises:
        ValueError: an archive changes while it is read.
        OSError: the storage fails; StorageUnavailable if only for the moment.
        ChildProcessError: a process died twice while it decoded nothing.
        RuntimeError: another exception in a process; the message holds its traceback.
    """
    if Storage(url).is_in_memory:  # processes do not share it
        for tar in tars:
            yield tar, index_tar(Storage(url), tar, rules, KnownSamples())
        return
    queue = deque(ArchiveJob(tar) for tar in tars)
    workers = [ArchiveWorker(url, rules) for _ in range(min(processes, len(tars)))]
    try:
        while queue or any(worker.job for worker in workers):
            for worker in workers:
                if worker.job is None and queue:
                    worker.submit(queue.popleft())
            busy = {worker.connection: worker for worker in workers if worker.job is not None}
            for connection in wait(list(busy), timeout=POLL_S):
                done = busy[connection].receive()  # type: ignore[index]
                if done is not None:
                    yield done
            for worker in workers:
                worker.check_time(decode_limit_s)
    finally:
        for worker in workers:
            worker.stop()


@dataclass(slots=True)
class ArchiveJob:
    """An archive to index, and what happened to it so far."""

    tar: ForeignTar
    known: KnownSamples = field(default_factory=KnownSamples)
    deaths: Counter[int | None] = field(default_factory=Counter)
    """Ends of processes by the offset of the sample that they decoded; None = no sample."""


class ArchiveWorker:
    """A process that indexes one archive at a time, replaced when it dies."""

    def __init__(self, url: str, rules: ForeignRules) -> None:
        self._arguments = (url, rules)
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._decoding: int | None = None
        self._began_s = 0.0
        self.job: ArchiveJob | None = None
        self._start()

    def submit(self, job: ArchiveJob) -> None:
        """Sends an archive to the process."""
        self.job, self._decoding = job, None
        try:
            self.connection.send((job.tar, job.known))
        except OSError:  # the idle process was killed
            self.stop()
            self._start()
            self.connection.send((job.tar, job.known))

    def receive(self) -> tuple[ForeignTar, ShardRecord] | None:
        """Receives what the process did; the record of its archive at the end."""
        job = self.job
        assert job is not None
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self._replace_process(job, f"ended with exit code {self.process.exitcode}")
            return None
        if isinstance(message, Exception):
            raise message
        if isinstance(message, str):
            raise RuntimeError(f"indexing {job.tar.name} raised:\n{message}")
        if isinstance(message, ShardRecord):
            self.job = None
            return job.tar, message
        offset, is_done = message
        self._decoding, self._began_s = (None if is_done else offset), time.monotonic()
        if is_done:
            job.known.passed.add(offset)
        return None

    def check_time(self, limit_s: float) -> None:
        """Ends the process if it decodes a video for too long."""
        if self.job is None or self._decoding is None:
            return
        if time.monotonic() - self._began_s > limit_s:
            self.job.known.refused[self._decoding] = f"not decoded within {limit_s:.0f} s"
            self._replace_process(self.job, f"decoded a video for more than {limit_s:.0f} s")

    def stop(self) -> None:
        """Ends the process; it holds no state."""
        self.connection.close()
        self.process.kill()
        self.process.join()

    def _start(self) -> None:
        self.connection, theirs = self._context.Pipe()
        self.process = self._context.Process(
            target=_worker_main, args=(theirs, *self._arguments), daemon=True
        )
        self.process.start()
        theirs.close()

    def _replace_process(self, job: ArchiveJob, how: str) -> None:
        offset = self._decoding
        job.deaths[offset] += 1
        where = f"{job.tar.name}" if offset is None else f"{job.tar.name}, byte {offset}"
        log.warning("a process %s at %s; a new one goes on", how, where)
        self.stop()
        if job.deaths[offset] >= MAX_DEATHS:
            if offset is None:
                raise ChildProcessError(
                    f"a process {how} at {where}, for the second time; archives that are done are"
                    " kept: repeat the command to resume"
                )
            job.known.refused.setdefault(offset, f"its process {how}, twice")
        self._start()
        self.submit(job)


def _worker_main(connection: Connection, url: str, rules: ForeignRules) -> None:
    """Indexes archives from the pipe until the parent closes it."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal signals the group; the parent reacts
    store = Storage(url)
    try:
        while True:
            tar, known = connection.recv()
            try:
                message = index_tar(store, tar, rules, known, lambda *place: connection.send(place))
            except StorageUnavailable as error:
                message = StorageUnavailable(str(error))  # its causes may not pickle
            except OSError as error:
                message = OSError(f"{tar.name}: {type(error).__name__}: {error}")
            except ValueError as error:
                message = ValueError(str(error))
            except Exception:
                message = traceback.format_exc()
            connection.send(message)
    except (EOFError, OSError):
        return


def _end_with_parent() -> None:
    """Ends this process when the command dies: the fork server, its parent, would not."""
    parent = parent_process()
    assert parent is not None, "multiprocessing started this process"

    def wait_for_end() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_for_end, name="parent", daemon=True).start()
