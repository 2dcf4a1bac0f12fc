"""Ends a job in which no step is finished any more, and names the rank that the others wait for.

A thread on every rank looks once a second at how long ago its rank last got on. Beyond the limit
each rank leaves its stacks and a line about where it is in run_dir/stalls/JOB. Who has not left
any, or is behind the others, is what they wait for: one rank says so, and all end with exit code 3.
No rank asks another one for anything, so one that is stopped holds up nobody's end.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Literal

from tvr.launchers.atomic_write import write_atomically
from tvr.launchers.exit_codes import EXIT_FAILED
from tvr.trainer.config import TrainConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.resilience.failures import Failures, end_line

FOLDER = "stalls"
POLL_S = 1.0
# Ranks come to the limit nearly at once: who has said nothing after this will not.
GRACE_S = 5.0
# A rank that does not see by itself that another one has failed: it waits for a GPU.
LEAVE_AFTER_S = 10.0
FLOOR_S = 60.0
START_S = 1800.0
FIRST_STEPS = 3
MEDIAN_OF = 50

# These lines tell only that ranks meet; who calls them tells what for.
MEETING_PLACES = (
    "tvr.trainer.distributed.world",
    "tvr.trainer.distributed.collectives",
    "tvr.trainer.distributed.exchange",
)

Phase = Literal["start", "checkpoint", "evaluation", "training"]
# As they follow one another after a step.
ORDER: tuple[Phase, ...] = ("start", "checkpoint", "evaluation", "training")


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """Where a rank is when it has not got on for too long."""

    rank: int
    host: str
    step: int
    """Steps finished."""
    phase: Phase
    in_collective: bool
    """Whether its main thread is in a call of torch.distributed: it waits for others."""
    line: str
    """The innermost line of this program in its main thread."""

    @property
    def progress(self) -> tuple[int, int, bool]:
        return self.step, ORDER.index(self.phase), self.in_collective

    def text(self) -> str:
        return f"after step {self.step} in {self.phase} ({self.line})"


def limit_s(train: TrainConfig, phase: Phase, step_times: Sequence[float]) -> float:
    """Seconds that a rank may take to get on."""
    if phase == "start":
        return max(START_S, train.timeout_s)
    if phase != "training" or len(step_times) < FIRST_STEPS:
        return train.timeout_s
    return min(train.timeout_s, max(FLOOR_S, train.stall_factor * median(step_times)))


def blame(known: Mapping[int, Whereabouts], hosts: Sequence[str]) -> tuple[list[int], str]:
    """The ranks that the others wait for, and a text that names them; none: all are as far."""
    silent = [rank for rank in range(len(hosts)) if rank not in known]
    last = min(where.progress for where in known.values())
    if silent:
        culprits = silent
        texts = [f"rank {r} on {hosts[r]} gives no sign (stopped, or gone)" for r in silent]
    else:
        culprits = [rank for rank, where in sorted(known.items()) if where.progress == last]
        texts = [f"rank {r} on {hosts[r]} is behind, {known[r].text()}" for r in culprits]
    others = {known[r].text() for r in known if r not in culprits}
    if not others:
        return [], f"all ranks are {'; '.join(sorted({w.text() for w in known.values()}))}"
    return culprits, f"{'; '.join(texts)}; the others wait {'; '.join(sorted(others))}"


class Watchdog:
    """One rank's. The loop says what it does; that costs an assignment."""

    def __init__(self, train: TrainConfig, run_dir: Path, world: World, failures: Failures) -> None:
        self._train = train
        self._folder = run_dir / FOLDER / failures.path.stem
        self._failures = failures
        self._rank = world.rank
        self._hosts = world.all_gather_objects(socket.gethostname())
        self._main = threading.get_ident()
        self._step_times: deque[float] = deque(maxlen=MEDIAN_OF)
        self._at: tuple[int, int, Phase] = (0, 0, "start")  # replaced whole: another thread reads
        self._over = threading.Event()

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """What the rank does within the block; it trains afterwards."""
        self._get_on(phase=phase)
        yield
        self._get_on(phase="training")

    def finished(self, step: int, seconds: float) -> None:
        """A step was finished."""
        self._step_times.append(seconds)
        self._get_on(step=step, phase="training")

    def watch(self) -> None:
        """The thread's work, until the job is over."""
        waited = failed = 0.0
        seen, before = self._at, time.monotonic()
        while not self._over.wait(POLL_S):
            now = time.monotonic()
            # A process that was stopped for a while did not take that time itself.
            tick, before = min(now - before, 2 * POLL_S), now
            waited, seen = (waited + tick if self._at is seen else 0.0), self._at
            failed = failed + tick if self._failures.read() is not None else 0.0
            if failed > LEAVE_AFTER_S:
                self._leave()
            limit = limit_s(self._train, seen[2], tuple(self._step_times))
            if self._train.stall_factor > 0 and waited > limit:
                self._end(waited, limit)

    def end(self) -> None:
        """Stops watching."""
        self._over.set()

    def _get_on(self, *, phase: Phase, step: int | None = None) -> None:
        count, before, _ = self._at
        self._at = (count + 1, before if step is None else step, phase)

    def _leave(self) -> None:
        found = self._failures.read()
        # Who has spoken ends by itself.
        if found is not None and found.rank != self._rank:
            _say(end_line(self._rank, found))
            _exit(found.code)

    def _end(self, waited: float, limit: float) -> None:
        mine = self._whereabouts()
        self._write(mine)
        known = self._wait_for_others(mine)
        culprits, text = blame(known, self._hosts)
        message = (
            f"no rank has got on for {waited:.0f} s (limit {limit:.0f} s): {text}. Stacks of all"
            f" threads: {self._folder}"
        )
        if self._rank in culprits:
            faulthandler.dump_traceback(file=2, all_threads=True)
        if self._failures.take():
            _say(f"tvr train: error [rank {self._rank}]: {message}")
            self._failures.spoken(message, EXIT_FAILED, of=min(culprits, default=None))
        _exit(EXIT_FAILED)

    def _whereabouts(self) -> Whereabouts:
        in_collective, line = _place_of(sys._current_frames().get(self._main))
        _, step, phase = self._at
        return Whereabouts(
            rank=self._rank,
            host=self._hosts[self._rank],
            step=step,
            phase=phase,
            in_collective=in_collective,
            line=line,
        )

    def _write(self, mine: Whereabouts) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._file("txt", self._rank).open("w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
            write_atomically(self._file("json", self._rank), json.dumps(asdict(mine)) + "\n")
        except OSError as error:
            _say(f"tvr train: rank {self._rank} stalls, and {self._folder} takes no file: {error}")
            faulthandler.dump_traceback(file=2, all_threads=True)

    def _wait_for_others(self, mine: Whereabouts) -> dict[int, Whereabouts]:
        known = {self._rank: mine}
        deadline = time.monotonic() + GRACE_S
        while len(known) < len(self._hosts) and time.monotonic() < deadline:
            for rank in range(len(self._hosts)):
                path = self._file("json", rank)
                if rank not in known and path.exists():
                    known[rank] = Whereabouts(**json.loads(path.read_text()))
            time.sleep(0.1)
        return known

    def _file(self, kind: str, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.{kind}"


@contextmanager
def watching(
    train: TrainConfig, run_dir: Path, world: World, failures: Failures
) -> Iterator[Watchdog]:
    """Watches this rank while the block runs. All ranks call it."""
    watchdog = Watchdog(train, run_dir, world, failures)
    thread = threading.Thread(target=watchdog.watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        watchdog.end()
        thread.join()


def _place_of(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a thread is in a collective, and the innermost line of this program."""
    in_collective, line = False, "unknown"
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("torch.distributed", "deepspeed.comm")):
            in_collective = True
        if module.startswith("tvr.") and module not in MEETING_PLACES:
            return in_collective, f"{module}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return in_collective, line


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _exit(code: int) -> None:
    """Without taking leave: the main thread hangs."""
    sys.stderr.flush()
    os._exit(code)
