"""Notices that files of an index were cut short while it is served.

The index maps its vectors into memory. Reading a mapped page that a truncation has removed kills
the process (SIGBUS), and the rest of a page that was cut reads as zeros. So sizes are compared
before each use. A file that was replaced is no danger: the mapping keeps the old one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from tvr.data_prep.records import ShardCorrupt

VALID_S = 0.05
"""A check holds so long, which bounds its cost when many searches run: a file takes 2 us."""


class IndexFiles:
    """The files of some folders, with the sizes they have when this is created."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._files: dict[str, tuple[int, int, int]] = {}
        for folder in folders:
            for root, _, names in os.walk(folder):
                for name in names:
                    path = os.path.join(root, name)
                    found = os.stat(path)
                    self._files[path] = (found.st_dev, found.st_ino, found.st_size)
        self._lock = threading.Lock()
        self._checked_at = -VALID_S

    def __len__(self) -> int:
        return len(self._files)

    def check(self) -> None:
        """Compares the sizes.

        Raises:
            ShardCorrupt: a file has become shorter; names it and both sizes.
        """
        with self._lock:
            if time.monotonic() - self._checked_at < VALID_S:
                return
            for path, (device, inode, size) in self._files.items():
                try:
                    found = os.stat(path)
                except FileNotFoundError:
                    continue  # what is mapped stays until it is closed
                is_same = (found.st_dev, found.st_ino) == (device, inode)
                if is_same and found.st_size < size:
                    raise ShardCorrupt(
                        f"{path} has {found.st_size} bytes; it had {size} when the service started"
                    )
            self._checked_at = time.monotonic()
