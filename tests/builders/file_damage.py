"""Ways to damage a file, each of which a checkpoint must notice."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def _flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Removes the last byte."""
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    """Changes one bit of the last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": _flip_bit,
}
