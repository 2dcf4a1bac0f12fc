"""A worker process that does one task at a time, within limits of memory and time.

Each process has its own pipe, so that a process that dies is identified together with its task. The
pool of concurrent.futures shares one pipe: a process killed while it writes a result leaves a
partial message there, and the pool waits forever for the rest (observed on Python 3.11).

The processes start through multiprocessing's forkserver. A fork would copy the locks held by
threads of fsspec and torch without the threads, and a spawned process would import everything.

Memory is limited by RLIMIT_DATA, the private memory of a process: beyond it, an allocation of
Python, numpy or libav fails, and the process ends with an exit code of its own. Nothing else on the
machine is touched, unlike by the kernel when memory runs out.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tvr.data_prep.storage.storage import StorageUnavailable
from tvr.launchers.host_limits import host_memory

MIB = 1 << 20
# A share of the memory that is available, so that the kernel need not end a process.
MEMORY_SHARE = 0.8
# A limit and no reservation: ordinary videos need a tenth of it.
MIN_MEMORY_BYTES = 1 << 30
# Longer than all retries of a store that fails (240 s), so that they end by StorageUnavailable, and
# shorter than the time in which an HTTP client gives up a request (300 s): a server that stops
# sending one file costs that file.
TIME_S = 270.0
# So long a process may take to start, when the machine is busy.
START_S = 600.0
# So long a process may take to end. One that waits in the kernel for a file system that is gone
# ends when that answers.
END_S = 30.0
# Of decoding and encoding; a video of 1 Mbit/s plays for 8 seconds per MiB.
TIME_S_PER_MIB = 10.0
MAX_STARTS = 3
OUT_OF_MEMORY_EXIT = 90
# Signals by which native code ends its process by its own fault. SIGKILL comes from outside: from
# the kernel when memory runs out, or from a user.
CRASH_SIGNALS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)

Alive = Callable[[int], object]
"""To be called with each sign of progress: with 0 during reads, and else with the bytes of the
source, for which the next stage may take TIME_S_PER_MIB longer."""
Work = Callable[[Any, Alive], Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLimits:
    """What one task of a worker process may take."""

    memory_bytes: int | None = None
    """Memory besides what the process has when it starts; None = MEMORY_SHARE of the host's
    available memory, divided by the processes, at least MIN_MEMORY_BYTES."""
    time_s: float = TIME_S
    """Seconds without progress: without a byte while a source is read, and then for the whole
    task, which may take TIME_S_PER_MIB more for each MiB of its source."""

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and self.memory_bytes < MIB:
            raise ValueError(f"memory_bytes={self.memory_bytes} must be at least {MIB} (1 MiB)")
        if not 0 < self.time_s < float("inf"):
            raise ValueError(f"time_s={self.time_s} must be above 0 and finite")

    def memory_of(self, processes: int) -> int:
        """Returns the bytes that a task of each of so many processes may take."""
        if self.memory_bytes is not None:
            return self.memory_bytes
        return max(MIN_MEMORY_BYTES, int(host_memory().available * MEMORY_SHARE / processes))

    def seconds(self, num_bytes: int) -> float:
        """Returns the seconds until the next sign of progress, see `Alive`."""
        return self.time_s + num_bytes / MIB * TIME_S_PER_MIB


@dataclass(frozen=True, slots=True)
class TaskFailure:
    """A process that ended, or was ended, while it did a task."""

    reason: str
    """One of LIMIT_REASONS, or "unreadable" for a crash of native code."""
    how: str
    """The process's end, such as "ended with SIGKILL"."""


@dataclass(frozen=True, slots=True)
class _Alive:
    seconds: float


@dataclass(frozen=True, slots=True)
class _Done:
    result: Any


@dataclass(frozen=True, slots=True)
class _Bug:
    traceback: str


NOTHING_YET = object()
"""`LimitedProcess.receive` got a sign of progress."""


class LimitedProcess:
    """A process for tasks, replaced when it dies.

    Args:
        make_work: Called in the process with `arguments`; returns the function that does a task.
        limits: Time that a task may take.
        memory_bytes: Memory that a task may take.
    """

    def __init__(
        self,
        make_work: Callable[..., Work],
        arguments: tuple[Any, ...],
        limits: ProcessLimits,
        memory_bytes: int,
    ) -> None:
        self._arguments = (make_work, arguments, limits, memory_bytes)
        self._limits = limits
        self._memory_bytes = memory_bytes
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload([make_work.__module__])
        self._task: Any = None
        self._num_starts = 0
        self.deadline_s = 0.0
        """When the task exceeds its time, on the clock `time.monotonic`."""
        self._start()

    def submit(self, task: Any) -> None:
        """Sends a task to the idle process."""
        self._task = task
        self._has_begun = False
        self.deadline_s = time.monotonic() + START_S
        try:
            self.connection.send(task)
        except OSError:  # the idle process was killed
            self.restart()
            self.connection.send(task)

    def receive(self) -> Any:
        """Returns the task's result or TaskFailure, or NOTHING_YET.

        After a TaskFailure a new process waits for a task.

        Raises:
            StorageUnavailable: raised by the task.
            RuntimeError: the task raised another exception; the message is its traceback.
            ChildProcessError: processes end before they begin.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            return self._ended()
        if isinstance(message, _Alive):
            self._has_begun, self._num_starts = True, 0
            self.deadline_s = time.monotonic() + message.seconds
            return NOTHING_YET
        if isinstance(message, _Bug):
            raise RuntimeError(message.traceback)
        if isinstance(message, StorageUnavailable):
            raise message
        return message.result

    def expire(self, now_s: float) -> TaskFailure | None:
        """Ends the process if its task exceeds its time; None if it does not."""
        if now_s < self.deadline_s or self.connection.poll():
            return None
        self._process.kill()
        self.restart()
        return TaskFailure(
            "timed_out",
            f"made no progress within its time limit, {self._limits.time_s:g} s and"
            f" {TIME_S_PER_MIB:g} s more for each MiB of a source that was read"
            " (--clip-timeout-s)",
        )

    def stop(self) -> None:
        """Terminates the process; it holds no state."""
        self.connection.close()
        self._process.terminate()
        self._process.join(END_S)

    def restart(self) -> None:
        """Replaces the process by a new one."""
        self.stop()
        self._start()

    @property
    def pid(self) -> int | None:
        """Process id."""
        return self._process.pid

    def _start(self) -> None:
        self.connection, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=work_in_process, args=(theirs, *self._arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def _ended(self) -> Any:
        self._process.join(END_S)
        exit_code = self._process.exitcode
        self.restart()
        if not self._has_begun:
            # Not the task's fault: the process had not begun it.
            self._num_starts += 1
            if self._num_starts >= MAX_STARTS:
                raise ChildProcessError(
                    f"packing processes end with {exit_name(exit_code)} while they start (out of"
                    " memory? a script without `if __name__ == '__main__'`?); complete shards are"
                    " kept: repeat the command to resume, with fewer --processes if memory is short"
                )
            self.submit(self._task)
            return NOTHING_YET
        if exit_code == OUT_OF_MEMORY_EXIT:
            return TaskFailure(
                "out_of_memory",
                f"reached its memory limit, {self._memory_bytes / 1e9:.3g} GB (--clip-memory-gb; by"
                " default the available memory divided by --processes)",
            )
        is_crash = exit_code is not None and -exit_code in CRASH_SIGNALS
        reason = "unreadable" if is_crash else "killed"
        return TaskFailure(reason, f"ended with {exit_name(exit_code)}")


def exit_name(exit_code: int | None) -> str:
    """Names a signal or an exit code."""
    is_signal = exit_code is not None and -exit_code in set(signal.Signals)
    return signal.Signals(-exit_code).name if is_signal else f"exit code {exit_code}"  # type: ignore[operator]


def work_in_process(
    connection: Connection,
    make_work: Callable[..., Work],
    arguments: tuple[Any, ...],
    limits: ProcessLimits,
    memory_bytes: int,
) -> None:
    """Does the tasks from the pipe until the parent closes it."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal signals the group; the parent reacts

    def alive(num_bytes: int) -> None:
        connection.send(_Alive(limits.seconds(num_bytes)))

    try:
        work = make_work(*arguments)
        _limit_memory(memory_bytes)
        while True:
            task = connection.recv()
            alive(0)
            try:
                message: Any = _Done(work(task, alive))
            except StorageUnavailable as error:
                message = StorageUnavailable(str(error))  # its causes may not pickle
            except MemoryError:
                raise
            except Exception:
                message = _Bug(traceback.format_exc())
            connection.send(message)
    except MemoryError:
        # A new process does the next task: this one may be left with fragments.
        os._exit(OUT_OF_MEMORY_EXIT)
    except (EOFError, OSError):
        return


def _limit_memory(memory_bytes: int) -> None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        (used_kb,) = [int(line.split()[1]) for line in lines if line.startswith("VmData:")]
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = used_kb * 1024 + memory_bytes
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    except (OSError, ValueError) as error:
        log.warning("a packing process has no memory limit of its own: %s", error)


def _end_with_parent() -> None:
    """Ends this process when its creator dies, also while it waits in a read.

    The fork server is this process's parent for the kernel, and lives as long as its children do.
    So a thread waits for the end of the pipe that the creator holds open.
    """
    creator = parent_process()
    assert creator is not None, "multiprocessing started this process"

    def wait_for_end() -> None:
        wait([creator.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_for_end, name="parent", daemon=True).start()
