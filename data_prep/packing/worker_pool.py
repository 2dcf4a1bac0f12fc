"""Clips packed by several processes, given back in their order.

Each process has a pipe of its own, so that one which is killed is known together with the clip it
had. concurrent.futures' pool shares one pipe: a process killed while it writes a result leaves half
of it there, and the pool waits for the rest forever (tried on Python 3.11).

The processes come from multiprocessing's forkserver: a fork of this process would copy the locks of
fsspec's and torch's threads without the threads, and a spawned one would import everything anew.
"""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

from tvr.data_prep.dataset.shard_writer import TarSample
from tvr.data_prep.packing.pack_clip import RefusedClip, pack_clip, refused
from tvr.data_prep.packing.plan import PackSettings
from tvr.data_prep.packing.words import WordTagger
from tvr.data_prep.records import Clip

# Clips in work or done before an earlier one is, for each process: a long video stops nobody.
AHEAD = 4
# How a decoder's own fault ends a process. SIGKILL is somebody else's: the system's, short of
# memory, or a user's.
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)

Outcome = TarSample | RefusedClip

log = logging.getLogger(__name__)


def available_processes() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def packed_clips(
    clips: Iterable[Clip],
    settings: PackSettings,
    processes: int,
    tagger: WordTagger | None = None,
) -> Generator[Outcome, None, None]:
    """`pack_clip` of every clip in order; with one process in this one.

    A clip whose process dies is packed again by a new one. If that one's decoder crashes as well,
    the clip is refused as unreadable.

    Raises:
        ChildProcessError: a clip's process was killed twice; names the clip.
        RuntimeError: packing a clip raised; with the traceback in its process.
    """
    if processes == 1:
        yield from (pack_clip(clip, settings, tagger) for clip in clips)
        return
    clips = iter(clips)
    window: deque[_Job] = deque()
    workers = [_Worker(settings, tagger) for _ in range(processes)]
    try:
        while True:
            for worker in workers:
                if worker.job is None and len(window) < AHEAD * processes:
                    for clip in clips:
                        window.append(_Job(clip))
                        worker.begin(window[-1])
                        break
            if not window:
                return
            busy = {worker.connection: worker for worker in workers if worker.job is not None}
            for connection in wait(list(busy), timeout=0 if window[0].outcome else None):
                busy[connection].end()  # type: ignore[index]
            if window[0].outcome is not None:
                yield window.popleft().outcome  # type: ignore[misc]
    finally:
        for worker in workers:
            worker.stop()


@dataclass(slots=True)
class _Job:
    clip: Clip
    outcome: Outcome | None = None
    deaths: list[int | None] = field(default_factory=list)
    """Exit codes of the processes that did not survive it."""


class _Worker:
    """A process that packs one clip at a time, and its successors."""

    def __init__(self, settings: PackSettings, tagger: WordTagger | None) -> None:
        self._settings = settings
        self._tagger = tagger
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self.job: _Job | None = None
        self._start()

    def begin(self, job: _Job) -> None:
        """Hands out a clip."""
        self.job = job
        try:
            self.connection.send(job.clip)
        except OSError:  # it was killed while it had nothing to do
            self.stop()
            self._start()
            self.connection.send(job.clip)

    def end(self) -> None:
        """Takes what became of the clip, or of the process."""
        job = self.job
        assert job is not None
        try:
            outcome = self.connection.recv()
        except (EOFError, OSError):
            self._succeed(job)
            return
        if isinstance(outcome, str):
            raise RuntimeError(f"packing {job.clip.key} ({job.clip.video}) raised:\n{outcome}")
        job.outcome, self.job = outcome, None

    def stop(self) -> None:
        """Ends the process, which keeps nothing that could be lost."""
        self.connection.close()
        self._process.terminate()
        self._process.join()

    def _start(self) -> None:
        self.connection, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_work, args=(theirs, self._settings, self._tagger), daemon=True
        )
        self._process.start()
        theirs.close()

    def _succeed(self, job: _Job) -> None:
        """A new process takes the place of one that died; the clip gets a second chance."""
        self._process.join()
        job.deaths.append(self._process.exitcode)
        how = f"a packing process ended with {_named(self._process.exitcode)}"
        where = f"while it packed {job.clip.key} ({job.clip.video})"
        self.stop()
        self._start()
        if len(job.deaths) == 1:
            log.warning("%s %s, which a new one packs again", how, where)
            self.begin(job)
        elif all(code is not None and -code in CRASHES for code in job.deaths):
            detail = f"the decoder ends its process with {_named(job.deaths[-1])}"
            job.outcome, self.job = refused(job.clip, "unreadable", detail), None
        else:
            raise ChildProcessError(
                f"{how} {where}, the second one to do so (out of memory?); complete shards stay:"
                " the same command goes on, with fewer --processes if memory is short"
            )


def _named(exit_code: int | None) -> str:
    known = exit_code is not None and -exit_code in set(signal.Signals)
    return signal.Signals(-exit_code).name if known else f"exit code {exit_code}"  # type: ignore[operator]


def _work(connection: Connection, settings: PackSettings, tagger: WordTagger | None) -> None:
    """Packs what comes until nobody is at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent acts
    try:
        while True:
            clip = connection.recv()
            try:
                outcome = pack_clip(clip, settings, tagger)
            except Exception:
                outcome = traceback.format_exc()
            connection.send(outcome)
    except (EOFError, OSError):
        return
