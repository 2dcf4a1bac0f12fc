"""Captions that loop, wait, end their process or take memory when a packing process reads them.

Packing processes import this module, so it imports little.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MIB = 1 << 20


class Does(tuple[str, ...]):
    """Captions that do something when a packing process looks at them."""

    action: Callable[[], None]

    def __new__(cls, action: Callable[[], None]) -> Does:
        made = super().__new__(cls, ("x",))
        made.action = action
        return made

    def __reduce__(self) -> Any:
        return Does, (self.action,)

    def __iter__(self) -> Iterator[str]:
        self.action()
        return iter(("x",))


def loop() -> None:
    while True:
        pass


def wait_forever() -> None:
    threading.Event().wait()


def leave() -> None:
    os._exit(3)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash_at_last() -> None:
    """Is killed first, and crashes then; the file tells them apart."""
    file = Path(tempfile.gettempdir()) / f"crash-{os.getppid()}"
    is_first = not file.exists()
    file.touch() if is_first else file.unlink()
    os.kill(os.getpid(), signal.SIGKILL if is_first else signal.SIGSEGV)


def eat() -> None:
    kept = []
    while True:
        kept.append(bytearray(MIB))


def fail_to_allocate() -> None:
    bytearray(1 << 44)
