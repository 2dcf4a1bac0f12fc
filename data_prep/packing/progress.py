"""Shows the progress of packing on stderr: a bar on a terminal, a line every 30 s in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tvr.data_prep.packing.pack import PackProgress
from tvr.data_prep.packing.plan_build import OnPlan

LINE_EVERY_S = 30.0

OnProgress = Callable[[PackProgress], None]


@contextmanager
def show_progress(
    title: str, *, line_every_s: float = LINE_EVERY_S, clock: Callable[[], float] = time.monotonic
) -> Iterator[OnProgress]:
    """Yields a callback that shows each PackProgress passed to it.

    Args:
        title: Start of each line, or label of the bar.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _LineLog(title, line_every_s, clock)
        return
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("{task.fields[rate]}"), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console) as bar:
        yield _Bar(title, bar, clock)


@contextmanager
def show_planning(
    title: str, *, line_every_s: float = LINE_EVERY_S, clock: Callable[[], float] = time.monotonic
) -> Iterator[OnPlan]:
    """Yields a callback that shows what planning does, a line every 30 s.

    Planning has no bar: the number of clips is known at its end.
    """
    last_line_s = clock()

    def show(step: str, done: int) -> None:
        nonlocal last_line_s
        now_s = clock()
        if now_s - last_line_s >= line_every_s:
            last_line_s = now_s
            print(f"{title}: {step} {done:,} clips", file=sys.stderr, flush=True)

    yield show


@dataclass(slots=True)
class _Rates:
    """Rates since the first progress; clips that were complete before do not count."""

    start_s: float
    start: PackProgress

    def text(self, progress: PackProgress, now_s: float) -> str:
        """Returns clips and megabytes a second."""
        seconds = max(now_s - self.start_s, 1e-9)
        return (
            f"{self.clips_per_s(progress, seconds):.1f} clips/s,"
            f" {progress.num_bytes / 1e6 / seconds:.1f} MB/s"
        )

    def time_left(self, progress: PackProgress, now_s: float) -> str:
        rate = self.clips_per_s(progress, max(now_s - self.start_s, 1e-9))
        return str(timedelta(seconds=round((progress.num_clips - progress.num_done) / rate)))

    def clips_per_s(self, progress: PackProgress, seconds: float) -> float:
        return (progress.num_done - self.start.num_done) / seconds


class _LineLog:
    def __init__(self, title: str, every_s: float, clock: Callable[[], float]) -> None:
        self._title = title
        self._every_s = every_s
        self._clock = clock
        self._rates: _Rates | None = None
        self._last_line_s = 0.0

    def __call__(self, progress: PackProgress) -> None:
        now_s = self._clock()
        if self._rates is None:
            self._rates, self._last_line_s = _Rates(now_s, progress), now_s
        elif now_s - self._last_line_s >= self._every_s:
            self._last_line_s = now_s
            rates, left = self._rates.text(progress, now_s), self._rates.time_left(progress, now_s)
            done = f"{progress.num_done:,} of {progress.num_clips:,} clips"
            print(f"{self._title}: {done}, {rates}, {left} left", file=sys.stderr, flush=True)


class _Bar:
    def __init__(self, title: str, bar: Progress, clock: Callable[[], float]) -> None:
        self._title = title
        self._bar = bar
        self._clock = clock
        self._rates: _Rates | None = None

    def __call__(self, progress: PackProgress) -> None:
        now_s = self._clock()
        if self._rates is None:
            self._rates = _Rates(now_s, progress)
            # Starts at the completed clips: rich would count them into the speed otherwise.
            self._task = self._bar.add_task(
                self._title, total=progress.num_clips, completed=progress.num_done, rate=""
            )
        else:
            rate = self._rates.text(progress, now_s)
            self._bar.update(self._task, completed=progress.num_done, rate=rate)
