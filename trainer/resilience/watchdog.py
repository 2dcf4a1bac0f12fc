"""Ends a job that makes no progress, and names the rank that the other ranks wait for.

A thread on every rank checks once a second when its rank last made progress. Beyond the limit each
rank writes its stack traces and its position (step, phase, source line, collectives entered) to
run_dir/stalls/JOB. `find_stalled_ranks` finds the cause in these files. One rank prints the report,
and all ranks exit with code 3. On GPUs each rank writes NCCL's flight recorder to the same folder.

The threads communicate through files only, so a suspended rank cannot keep the others from exiting.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from types import FrameType

from tvr.launchers.atomic_write import write_atomically
from tvr.launchers.exit_codes import EXIT_FAILED
from tvr.trainer.config import TrainConfig
from tvr.trainer.distributed.flight_recorder import FILE_PREFIX, flight_record
from tvr.trainer.distributed.world import World
from tvr.trainer.resilience.failure_file import FailureFile
from tvr.trainer.resilience.failures import peer_failure_line
from tvr.trainer.resilience.stalled_ranks import (
    Phase,
    RankStatus,
    find_stalled_ranks,
    rank_at_fault,
)

FOLDER = "stalls"
POLL_S = 1.0
# All ranks reach the limit at nearly the same time. One that has not written its file by then
# cannot write it.
COLLECT_S = 5.0
# A rank that waits for its GPU does not notice that another rank has failed, and exits after this.
EXIT_AFTER_FAILURE_S = 10.0
# The driver answers the flight recorder's questions at once, or never.
RECORD_LIMIT_S = 10.0
START_LIMIT_S = 1800.0
# Fewer steps give no useful median: the first ones compile kernels and fill caches.
FIRST_STEPS = 3
MEDIAN_OF = 50

# Lines of these modules show only that a rank communicates; their caller shows what for.
COLLECTIVE_MODULES = "tvr.trainer.distributed."


def stall_limit_s(train: TrainConfig, phase: Phase, step_times: Sequence[float]) -> float:
    """Seconds without progress after which a rank counts as stalled.

    Args:
        step_times: Seconds of the last training steps.
    """
    if phase == "start":
        return max(START_LIMIT_S, train.timeout_s)
    if phase != "training" or len(step_times) < FIRST_STEPS:
        return train.timeout_s
    return min(train.timeout_s, max(train.stall_min_s, train.stall_factor * median(step_times)))


class Watchdog:
    """Watches one rank. The training loop reports its progress, at the cost of an assignment."""

    def __init__(
        self, train: TrainConfig, run_dir: Path, world: World, failures: FailureFile
    ) -> None:
        self._train = train
        self._folder = run_dir / FOLDER / failures.path.stem
        self._failures = failures
        self._rank = world.rank
        self._wait_points = world.wait_points
        self._uses_nccl = world.device.type == "cuda"
        self._hosts = world.all_gather_objects(socket.gethostname())
        self._main = threading.get_ident()
        self._step_times: deque[float] = deque(maxlen=MEDIAN_OF)
        # Count of progress reports, finished steps, phase. The watchdog's thread reads the tuple,
        # so it is always replaced as a whole.
        self._position: tuple[int, int, Phase] = (0, 0, "start")
        self._stopped = threading.Event()

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Marks the block as a phase; the training phase follows."""
        self._record_progress(phase=phase)
        yield
        self._record_progress(phase="training")

    def progress(self) -> None:
        """Records progress within the present phase, such as a part of a long start."""
        self._record_progress(phase=self._position[2])

    def step_finished(self, step: int, seconds: float) -> None:
        """Records a finished step and its duration."""
        self._step_times.append(seconds)
        self._record_progress(step=step, phase="training")

    def run(self) -> None:
        """Checks for progress until `stop` is called; ends the process if the job stalls."""
        waited = failed = 0.0
        seen, before = self._position, time.monotonic()
        while not self._stopped.wait(POLL_S):
            now = time.monotonic()
            # A suspended process must not count its suspension as waiting.
            tick, before = min(now - before, 2 * POLL_S), now
            waited, seen = (waited + tick if self._position is seen else 0.0), self._position
            failed = failed + tick if self._failures.read() is not None else 0.0
            if failed > EXIT_AFTER_FAILURE_S:
                self._exit_after_failure()
            limit = stall_limit_s(self._train, seen[2], tuple(self._step_times))
            if self._train.stall_factor > 0 and waited > limit:
                self._abort(waited, limit)

    def stop(self) -> None:
        """Ends `run`."""
        self._stopped.set()

    def _record_progress(self, *, phase: Phase, step: int | None = None) -> None:
        # Steps and phases end with values on the host, so the device has finished their work.
        self._wait_points.synchronised()
        count, before, _ = self._position
        self._position = (count + 1, before if step is None else step, phase)

    def _exit_after_failure(self) -> None:
        """Exits if another rank has reported a failure; the reporting rank exits by itself."""
        failure = self._failures.read()
        if failure is not None and failure.rank != self._rank:
            _print_error(peer_failure_line(self._rank, failure))
            _exit_at_once(failure.code)

    def _abort(self, waited: float, limit: float) -> None:
        """Writes this rank's status, reports the stall on one rank, and exits."""
        own = self._status()
        self._write_status(own)
        known = self._collect_statuses(own)
        stalled, text = find_stalled_ranks(known, self._hosts)
        traces = "Stack traces of all threads" + (
            " and NCCL's flight recorder" if self._uses_nccl else ""
        )
        message = (
            f"no rank has made progress for {waited:.0f} s (limit {limit:.0f} s): {text}. {traces}:"
            f" {self._folder}"
        )
        if self._rank in stalled:
            faulthandler.dump_traceback(file=2, all_threads=True)
        if self._failures.claim():
            _print_error(f"tvr train: error [rank {self._rank}]: {message}")
            at_fault = rank_at_fault(stalled, self._hosts)
            self._failures.record(message, EXIT_FAILED, of=at_fault)
        if self._uses_nccl:
            self._write_flight_record()
        _exit_at_once(EXIT_FAILED)

    def _status(self) -> RankStatus:
        _, step, phase = self._position
        waiting = self._wait_points.waiting
        return RankStatus(
            rank=self._rank,
            host=self._hosts[self._rank],
            step=step,
            phase=phase,
            line=_innermost_line(sys._current_frames().get(self._main)),
            entered=self._wait_points.entered,
            members=self._wait_points.members,
            waiting=None if waiting is None else waiting.text(),
        )

    def _write_status(self, own: RankStatus) -> None:
        """Writes stack traces and status to the stall folder, or the traces to stderr."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._file("txt", self._rank).open("w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
            write_atomically(self._file("json", self._rank), json.dumps(asdict(own)) + "\n")
        except OSError as error:
            _print_error(
                f"tvr train: rank {self._rank} stalls and cannot write to {self._folder}: {error}"
            )
            faulthandler.dump_traceback(file=2, all_threads=True)

    def _write_flight_record(self) -> None:
        """Writes the record last, because the driver may hang with Python's lock held."""
        # Its thread needs no lock. It exits with code 1, which launchers treat like 3.
        faulthandler.dump_traceback_later(RECORD_LIMIT_S, exit=True, file=2)
        try:
            record = flight_record()
            if record is not None:
                (self._folder / f"{FILE_PREFIX}{self._rank}").write_bytes(record)
        except (OSError, RuntimeError) as error:
            _print_error(
                f"tvr train: rank {self._rank} cannot write NCCL's flight recorder: {error}"
            )
        faulthandler.cancel_dump_traceback_later()

    def _collect_statuses(self, own: RankStatus) -> dict[int, RankStatus]:
        """The statuses that the ranks write within `COLLECT_S`."""
        known = {self._rank: own}
        deadline = time.monotonic() + COLLECT_S
        while len(known) < len(self._hosts) and time.monotonic() < deadline:
            for rank in range(len(self._hosts)):
                path = self._file("json", rank)
                if rank not in known and path.exists():
                    known[rank] = RankStatus(**json.loads(path.read_text()))
            time.sleep(0.1)
        return known

    def _file(self, kind: str, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.{kind}"


@contextmanager
def running_watchdog(
    train: TrainConfig, run_dir: Path, world: World, failures: FailureFile
) -> Iterator[Watchdog]:
    """Watches this rank during the block. All ranks call it."""
    watchdog = Watchdog(train, run_dir, world, failures)
    thread = threading.Thread(target=watchdog.run, name="watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        watchdog.stop()
        thread.join()


def _innermost_line(frame: FrameType | None) -> str:
    """A thread's innermost line of this program outside `distributed`."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("tvr.") and not module.startswith(COLLECTIVE_MODULES):
            return f"{module}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "unknown"


def _print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _exit_at_once(code: int) -> None:
    """Ends the process without clean-up, which would wait for the main thread."""
    sys.stderr.flush()
    os._exit(code)
