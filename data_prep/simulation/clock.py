"""A clock that jumps from event to event, and the processes that wait for it.

A process is a generator. It yields the time at which it goes on, or a `Signal` for which it waits.
Equal times are served in the order in which they were requested, so a simulation is deterministic.
"""

from __future__ import annotations

from collections.abc import Generator
from heapq import heappop, heappush
from itertools import count

Process = Generator["float | Signal", None, None]


class Signal:
    """An event that happens once; processes wait for it by yielding it."""

    __slots__ = ("has_fired", "waiting")

    def __init__(self) -> None:
        self.has_fired = False
        self.waiting: list[Process] = []


class SimulatedClock:
    """Runs processes in the order of their times, in seconds from 0."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Process]] = []
        self._numbers = count()

    def start(self, process: Process) -> None:
        """Lets a process begin now, after those that are due already."""
        heappush(self._events, (self.now, next(self._numbers), process))

    def fire(self, signal: Signal) -> None:
        """Lets all processes go on that wait for a signal."""
        signal.has_fired = True
        for process in signal.waiting:
            self.start(process)
        signal.waiting.clear()

    def run(self) -> None:
        """Serves events until none is left."""
        events, numbers = self._events, self._numbers
        while events:
            self.now, _, process = heappop(events)
            for wanted in process:
                if not isinstance(wanted, Signal):
                    heappush(events, (wanted, next(numbers), process))
                    break
                if not wanted.has_fired:
                    wanted.waiting.append(process)
                    break
