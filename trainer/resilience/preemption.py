"""Catches the signals that ask a job to stop; training acts on them between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SLURM sends the signal of its --signal option, and SIGTERM before it kills a job.
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class StopNotice:
    """The signal that asked this process to stop; None so far if there was none."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def received(self) -> bool:
        """True once a signal has asked the process to stop."""
        return self.signal is not None

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)


@contextmanager
def catching_stop_signals() -> Iterator[StopNotice]:
    """Records stop signals during the block. Only a process's main thread can call it."""
    notice = StopNotice()
    before = {number: signal.signal(number, notice._record) for number in STOP_SIGNALS}
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
