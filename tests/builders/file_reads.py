"""Counts the files that a process opens for reading, and the bytes that ranks as threads read."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tvr.data_prep.storage.storage_folder import StorageFolder

# An audit hook cannot be removed, so there is one, which serves all blocks.
_counters: list[tuple[str, Counter[str]]] = []


@contextmanager
def opened_files(folder: Path) -> Iterator[Counter[str]]:
    """Counts how often this process opens each file below `folder` for reading.

    It sees `open` and `os.open`, and so `torch.load`; names are relative to `folder`.
    """
    _install_hook()
    entry = (f"{folder}{os.sep}", Counter[str]())
    _counters.append(entry)
    try:
        yield entry[1]
    finally:
        _counters.remove(entry)


@cache
def _install_hook() -> None:
    sys.addaudithook(_on_event)


def _on_event(event: str, args: tuple[Any, ...]) -> None:
    if event != "open" or not _counters:
        return
    path, mode, flags = args
    writes = any(letter in mode for letter in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
    if isinstance(path, str | os.PathLike) and not writes:
        for folder, counter in list(_counters):
            name = os.fspath(path)
            if isinstance(name, str) and name.startswith(folder) and not os.path.isdir(name):
                counter[name.removeprefix(folder)] += 1


class CountingStorage(StorageFolder):
    """A storage that counts its reads and the bytes that they return, by file name."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.opened: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()

    def read(self, name: str) -> bytes:
        content = super().read(name)
        self.opened[name] += 1
        self.num_bytes[name] += len(content)
        return content

    def read_chunks(self, name: str) -> Iterator[bytes]:
        for number, content in enumerate(super().read_chunks(name)):
            self.opened[name] += number == 0
            self.num_bytes[name] += len(content)
            yield content
