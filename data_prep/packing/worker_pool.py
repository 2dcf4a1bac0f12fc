"""Packs clips in several processes and returns them in order.

Each process has its own pipe, so that a killed process is identified together with its clip.
The pool of concurrent.futures shares one pipe: a process killed while it writes a result leaves a
partial message there, and the pool waits forever for the rest (observed on Python 3.11).

The processes start through multiprocessing's forkserver. A fork would copy the locks held by
threads of fsspec and torch without the threads, and a spawned process would import everything.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait

from tvr.data_prep.dataset.shard_writer import TarSample
from tvr.data_prep.packing.pack_clip import LastSource, RefusedClip, pack_clip, refuse_clip
from tvr.data_prep.packing.plan import PackSettings
from tvr.data_prep.packing.words import WordTagger
from tvr.data_prep.records import Clip
from tvr.data_prep.storage.storage import StorageUnavailable
from tvr.launchers.host_limits import host_cpus

# Videos per process that may be in work, or done ahead of an earlier clip, so that a long video
# does not stall the other processes.
WINDOW_PER_PROCESS = 4
# Bytes of clips that may be done ahead.
HELD_BYTES = 1 << 29
# Signals by which a decoder's own fault ends a process. SIGKILL comes from outside: from the
# kernel when memory runs out, or from a user.
CRASH_SIGNALS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)

PackedClip = TarSample | RefusedClip

log = logging.getLogger(__name__)


def available_processes() -> int:
    """Returns the number of CPUs that this process may use."""
    return host_cpus().usable


def pack_clips(
    clips: Iterable[Clip],
    settings: PackSettings,
    processes: int,
    tagger: WordTagger | None = None,
) -> Generator[PackedClip, None, None]:
    """Yields `pack_clip` of every clip, in order.

    One process means the calling process. Clips of one video that follow each other go to one
    process, which reads the video once. A clip whose process dies is packed once more by a new
    process. If its decoder crashes both times, the clip is refused as unreadable.

    Raises:
        ChildProcessError: a clip's process died twice, not both times by a crash.
        StorageUnavailable: the storage of a clip's video fails for the moment.
        RuntimeError: `pack_clip` raised another exception; the message holds its traceback.
    """
    if processes == 1:
        last_source = LastSource()
        yield from (pack_clip(clip, settings, tagger, last_source) for clip in clips)
        return
    groups = (list(group) for _, group in groupby(clips, key=lambda clip: clip.video))
    window: deque[_Job] = deque()
    num_groups = num_held = 0
    workers = [_Worker(settings, tagger) for _ in range(processes)]
    try:
        while True:
            for worker in workers:
                if worker.job is not None:
                    continue
                if not worker.queue and num_groups < WINDOW_PER_PROCESS * processes:
                    for group in groups:
                        worker.queue.extend(_Job(clip) for clip in group)
                        worker.queue[-1].ends_group = True
                        window.extend(worker.queue)
                        num_groups += 1
                        break
                # The first clip of all is never held up: the others wait for it.
                if worker.queue and (num_held < HELD_BYTES or worker.queue[0] is window[0]):
                    worker.submit(worker.queue.popleft())
            if not window:
                return
            busy = {worker.connection: worker for worker in workers if worker.job is not None}
            for connection in wait(list(busy), timeout=0 if window[0].outcome else None):
                num_held += busy[connection].receive()  # type: ignore[index]
            if window[0].outcome is not None:
                job = window.popleft()
                num_held -= job.num_bytes
                num_groups -= job.ends_group
                yield job.outcome  # type: ignore[misc]
    finally:
        for worker in workers:
            worker.stop()


@dataclass(slots=True)
class _Job:
    clip: Clip
    outcome: PackedClip | None = None
    ends_group: bool = False
    """True for the last of the clips of one video."""
    exit_codes: list[int | None] = field(default_factory=list)
    """Exit codes of the processes that died while they packed the clip."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed clip."""
        return len(self.outcome.stored) if isinstance(self.outcome, TarSample) else 0


class _Worker:
    """A process that packs one clip at a time, replaced when it dies."""

    def __init__(self, settings: PackSettings, tagger: WordTagger | None) -> None:
        self._settings = settings
        self._tagger = tagger
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self.job: _Job | None = None
        self.queue: deque[_Job] = deque()
        """Clips of the same video that come next."""
        self._start()

    def submit(self, job: _Job) -> None:
        """Sends a clip to the process."""
        self.job = job
        try:
            self.connection.send(job.clip)
        except OSError:  # the idle process was killed
            self.stop()
            self._start()
            self.connection.send(job.clip)

    def receive(self) -> int:
        """Receives the packed clip, or handles the death of the process.

        Returns the bytes of the clip.
        """
        job = self.job
        assert job is not None
        try:
            outcome = self.connection.recv()
        except (EOFError, OSError):
            self._replace_process(job)
            return 0
        if isinstance(outcome, StorageUnavailable):
            raise outcome
        if isinstance(outcome, str):
            raise RuntimeError(f"packing {job.clip.key} ({job.clip.video}) raised:\n{outcome}")
        job.outcome, self.job = outcome, None
        return job.num_bytes

    def stop(self) -> None:
        """Terminates the process; it holds no state."""
        self.connection.close()
        self._process.terminate()
        self._process.join()

    def _start(self) -> None:
        self.connection, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_worker_main, args=(theirs, self._settings, self._tagger), daemon=True
        )
        self._process.start()
        theirs.close()

    def _replace_process(self, job: _Job) -> None:
        """Starts a new process and retries the clip once."""
        self._process.join()
        job.exit_codes.append(self._process.exitcode)
        how = f"a packing process ended with {_exit_name(self._process.exitcode)}"
        where = f"while it packed {job.clip.key} ({job.clip.video})"
        self.stop()
        self._start()
        if len(job.exit_codes) == 1:
            log.warning("%s %s; a new process packs the clip again", how, where)
            self.submit(job)
        elif all(code is not None and -code in CRASH_SIGNALS for code in job.exit_codes):
            detail = f"the decoder crashed twice with {_exit_name(job.exit_codes[-1])}"
            job.outcome, self.job = refuse_clip(job.clip, "unreadable", detail), None
        else:
            raise ChildProcessError(
                f"{how} {where}, for the second time (out of memory?); complete shards are kept:"
                " repeat the command to resume, with fewer --processes if memory is short"
            )


def _exit_name(exit_code: int | None) -> str:
    is_signal = exit_code is not None and -exit_code in set(signal.Signals)
    return signal.Signals(-exit_code).name if is_signal else f"exit code {exit_code}"  # type: ignore[operator]


def _worker_main(connection: Connection, settings: PackSettings, tagger: WordTagger | None) -> None:
    """Packs clips from the pipe until the parent closes it."""
    _end_with_packing()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal signals the group; the parent reacts
    last_source = LastSource()
    try:
        while True:
            clip = connection.recv()
            try:
                outcome = pack_clip(clip, settings, tagger, last_source)
            except StorageUnavailable as error:
                outcome = StorageUnavailable(str(error))  # without its causes, which may not pickle
            except Exception:
                outcome = traceback.format_exc()
            connection.send(outcome)
    except (EOFError, OSError):
        return


def _end_with_packing() -> None:
    """Ends this process when the packing process dies, also while it waits in a read.

    The fork server is this process's parent for the kernel, and lives as long as its children do.
    So a thread waits for the end of the pipe that the packing process holds open.
    """
    packing = parent_process()
    assert packing is not None, "multiprocessing started this process"

    def wait_for_end() -> None:
        wait([packing.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_for_end, name="parent", daemon=True).start()
