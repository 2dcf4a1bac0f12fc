"""A column of a feature set in its file, whose rows are read when they are indexed.

A file is open only while it is read: a million videos have some 17,000 files, more than a process
may hold open. Nothing is mapped: reading a mapped page of a file that was cut short kills the
process (SIGBUS).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tvr.data_prep.records import ShardCorrupt

Rows = slice | Tensor | np.ndarray | Sequence[int]


class StoredColumn:
    """Rows of an array in a file; safe to use from several threads."""

    def __init__(self, path: Path, kind: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._path, self._kind, self._shape = path, kind, shape
        self._row_bytes = kind.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        self._identity = _identity(os.stat(path))

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Reads some rows, consecutive ones at once.

        Raises:
            ShardCorrupt: the file is not the one that was there when the column was created, or its
                size differs.
        """
        if isinstance(rows, slice):
            first, end, _ = rows.indices(self._shape[0])
            starts, counts = [first], [max(0, end - first)]
        else:
            edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
            starts = rows[edges[:-1]].tolist() if len(rows) else []
            counts = [end - first for first, end in pairwise(edges)]
        out = np.empty((sum(counts), *self._shape[1:]), self._kind)
        if out.size:
            self._read(out.reshape(-1).view(np.uint8).data, starts, counts)
        return out

    def _read(self, out: memoryview, starts: list[int], counts: list[int]) -> None:
        try:
            file = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise ShardCorrupt(f"{self._path}: gone since it was opened; open it again") from error
        try:
            found = _identity(os.fstat(file))
            if found[:2] != self._identity[:2]:
                raise ShardCorrupt(f"{self._path}: replaced since it was opened; open it again")
            done = 0
            for start, count in zip(starts, counts, strict=True):
                end, offset = done + count * self._row_bytes, start * self._row_bytes
                while done < end:
                    size = os.preadv(file, [out[done:end]], offset)
                    if not size:
                        raise ShardCorrupt(
                            f"{self._path}: {found[2]} bytes instead of {self._identity[2]}; embed"
                            " again"
                        )
                    done, offset = done + size, offset + size
        finally:
            os.close(file)


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_size


def row_numbers(rows: Rows, count: int) -> np.ndarray:
    """Numbers of some of `count` rows. Raises IndexError for others."""
    if isinstance(rows, slice):
        return np.arange(*rows.indices(count))
    found = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows, dtype=np.int64).reshape(-1)
    if found.size and not (0 <= int(found.min()) and int(found.max()) < count):
        raise IndexError(f"rows {found.min()} to {found.max()}; allowed are 0 to {count - 1}")
    return found
