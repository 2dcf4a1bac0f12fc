"""Where the time of a step goes, for who measures: the metrics of a run, and benchmarks."""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import pairwise

import torch

# In the order of a step; "between" is what lies between two steps, the log for example.
PARTS = (
    "data wait",
    "encode",
    "gather",
    "similarity",
    "loss",
    "backward",
    "optimiser",
    "save",
    "between",
)
# And what is no step's: a run may evaluate between two.
ALL_PARTS = (*PARTS, "evaluation")


class Stopwatch:
    """Told at the end of each part of a step. This one does nothing."""

    def lap(self, part: str) -> None:
        """The time since the last lap was `part`'s, one of ALL_PARTS."""


class Laps(Stopwatch):
    """Seconds by part. On a GPU by events in its queue, read without stopping it at each lap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [("", self._now())]

    def lap(self, part: str) -> None:
        assert part in ALL_PARTS, part
        self._marks.append((part, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds since the last call, by part; their sum is all the time there was."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self.take_known()

    def take_known(self) -> dict[str, float]:
        """As `take`, but waits for nothing: what a GPU has not come to yet is left for later."""
        known = 1
        while known < len(self._marks) and _is_past(self._marks[known][1]):
            known += 1
        past, self._marks = self._marks[:known], self._marks[known - 1 :]
        seconds: dict[str, float] = defaultdict(float)
        for (_, before), (part, now) in pairwise(past):
            seconds[part] += _seconds(before, now)
        return dict(seconds)

    def restart(self) -> None:
        """Forgets the time until now."""
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
