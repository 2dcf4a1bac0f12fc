"""Where the time of a step goes, for who measures: training itself carries a watch that does
nothing."""

from __future__ import annotations

import time
from collections import defaultdict

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


class Stopwatch:
    """Told at the end of each part of a step. This one does nothing."""

    def lap(self, part: str) -> None:
        """The time since the last lap was `part`'s, one of PARTS."""


class Laps(Stopwatch):
    """Seconds by part. On a GPU by events in its queue, read without stopping it at each lap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [("", self._now())]

    def lap(self, part: str) -> None:
        assert part in PARTS, part
        self._marks.append((part, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds since the last call, by part; their sum is all the time there was."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds: dict[str, float] = defaultdict(float)
        for (_, before), (part, now) in zip(self._marks, self._marks[1:], strict=False):
            seconds[part] += _seconds(before, now)
        self._marks = [("", self._marks[-1][1])]
        return dict(seconds)

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(before: float | torch.cuda.Event, now: float | torch.cuda.Event) -> float:
    if isinstance(before, torch.cuda.Event) and isinstance(now, torch.cuda.Event):
        return before.elapsed_time(now) / 1000
    assert isinstance(before, float)
    assert isinstance(now, float)
    return now - before
