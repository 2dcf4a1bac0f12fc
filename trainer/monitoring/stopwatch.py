"""Time of the parts of a step, for the metrics of a run and for benchmarks."""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import pairwise

import torch

from tvr.trainer.monitoring.step_record import ALL_PARTS


class Stopwatch:
    """Null stopwatch: ignores all laps."""

    def lap(self, part: str) -> None:
        """Ends a part, one of ALL_PARTS: it lasted since the end of the part before."""


class LapStopwatch(Stopwatch):
    """Measures seconds by part.

    On a GPU the laps are events in its stream, so that measuring does not synchronise with it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [("", self._now())]

    def lap(self, part: str) -> None:
        assert part in ALL_PARTS, part
        self._marks.append((part, self._now()))

    def pop_all(self) -> dict[str, float]:
        """Seconds by part since the last call, after waiting for the GPU; they sum to all time."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self.pop_finished()

    def pop_finished(self) -> dict[str, float]:
        """Seconds by part since the last call, of the parts that the GPU has finished.

        It does not wait: later calls return the other parts.
        """
        known = 1
        while known < len(self._marks) and _is_past(self._marks[known][1]):
            known += 1
        past, self._marks = self._marks[:known], self._marks[known - 1 :]
        seconds: dict[str, float] = defaultdict(float)
        for (_, before), (part, now) in pairwise(past):
            seconds[part] += _seconds(before, now)
        return dict(seconds)

    def restart(self) -> None:
        """Discards the time until now."""
        self._marks = [("", self._now())]

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _is_past(mark: float | torch.cuda.Event) -> bool:
    return not isinstance(mark, torch.cuda.Event) or mark.query()


def _seconds(before: float | torch.cuda.Event, now: float | torch.cuda.Event) -> float:
    if isinstance(before, torch.cuda.Event) and isinstance(now, torch.cuda.Event):
        return before.elapsed_time(now) / 1000
    assert isinstance(before, float)
    assert isinstance(now, float)
    return now - before
