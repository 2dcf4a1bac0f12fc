"""A notice that the job must leave its nodes soon: noted when it comes, acted on between steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What batch systems send: SLURM's --signal by choice, SIGTERM before it kills.
NOTICES = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class Notice:
    """Whether this process was told to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def given(self) -> bool:
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)


@contextmanager
def noticing() -> Iterator[Notice]:
    """Catches the signals while it lasts. Only a process's main thread can."""
    notice = Notice()
    before = {number: signal.signal(number, notice._note) for number in NOTICES}
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
