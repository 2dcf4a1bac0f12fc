"""What the readers of containers share: bounded reads, and the error for a file cut short."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

Content = bytes | mmap.mmap
"""A file. Every value in it may be wrong, so it is compared with the size before it is used."""

MAX_ELEMENTS = 1 << 22
"""Elements that are looked at in one file; the rest of a longer list is taken for whole."""


class CutShort(Exception):
    """The file ends before something that it says it has. The message says what."""


def number(content: Content, at: int, size: int, order: str = "big") -> int:
    """Reads an unsigned integer; bytes behind the end of the file count as absent."""
    return int.from_bytes(content[at : at + size], "little" if order == "little" else "big")


def require(content: Content, end: int, what: str) -> None:
    """Raises CutShort if something ends behind the end of the file."""
    if end > len(content):
        raise CutShort(f"{what} ends at byte {end}, and the file has {len(content)}")


@contextmanager
def mapped(source: bytes | str | PathLike[str]) -> Iterator[Content]:
    """Opens the content of a file, or passes bytes on. Raises OSError."""
    if isinstance(source, bytes):
        yield source
        return
    with open(source, "rb") as file:
        if not file.read(1):  # an empty file cannot be mapped
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content
