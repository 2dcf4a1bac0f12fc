"""The rows of a published data set: mapped from a file, and checked when they are first read.

Opening reads the table of the file of rows only (see `sample_blocks`). The pages of the file are in
the operating system's cache once, for all ranks and workers of a node. Forked workers share the
mapping, and the notes of the blocks that are already checked.
"""

from __future__ import annotations

import hashlib
import mmap
import operator
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvr.data_prep.dataset.index_rules import refuse
from tvr.data_prep.dataset.node_copy import copy_to_node
from tvr.data_prep.dataset.sample_blocks import (
    HEADER,
    NUMBERS,
    TEXTS,
    BlockRows,
    RowsFile,
    SampleBlock,
    divide_rows,
    read_table,
)
from tvr.data_prep.dataset.sample_table import SampleTable, text_array
from tvr.data_prep.records import ShardCorrupt
from tvr.data_prep.storage.retries import LOCAL_ATTEMPTS, Retries
from tvr.data_prep.storage.storage import Storage

# Blocks whose views a process keeps; a view is a few kilobytes, beside the mapped pages.
RECENT_BLOCKS = 256
CHUNK_ROWS = 1 << 14
"""Rows that iterating over a column holds at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFiles:
    """What the values of the rows are checked against."""

    num_samples: Sequence[int]
    """Rows of each shard."""
    num_bytes: Sequence[int]
    """Size of the file that holds each shard's samples."""
    is_tar: bool
    """The samples lie in tar files, hence in whole blocks of tar."""


class MappedRows:
    """An opened file of rows. Works in forked processes and in several threads.

    Args:
        url: Folder or fsspec URL of the data set.
        name: Name of the file.
        entry: Its size and hash by `manifest.json`.
        files: Shards of the data set.
        node_folder: Folder on this node for the file of a remote data set; None = a folder of this
            user for temporary files.

    Raises:
        ShardCorrupt: the file is missing, has another size, or its table is damaged or edited.
        OSError: the storage fails, or there is no space for the file of a remote data set.
    """

    def __init__(
        self, url: str, name: str, entry: RowsFile, files: SampleFiles, node_folder: str | None
    ) -> None:
        self._files = files
        self._blocks: BlockRows = divide_rows(files.num_samples)
        self._starts: list[int] = self._blocks.starts.tolist()
        self._recent: dict[int, SampleBlock] = {}
        self._descriptor = -1
        self._copy: str | None = None
        store = Storage(url)
        self.where = store.path(name)
        least = HEADER.size + self._blocks.table_bytes
        if entry.num_bytes < least:
            refuse(self.where, "num_bytes", entry.num_bytes, f"at least {least}")
        try:
            self._open(store, name, entry, node_folder)
        except FileNotFoundError as error:
            missing = f"{self.where} is missing although manifest.json is there"
            raise ShardCorrupt(missing) from error
        header = self._read(0, HEADER.size)
        table = self._read(entry.num_bytes - self._blocks.table_bytes, entry.num_bytes)
        self._table = read_table(header, table, entry, self._blocks, self.where)
        sizes = self._table["num_bytes"].astype(np.int64)
        self._positions = HEADER.size + np.append(0, np.cumsum(sizes))
        # Shared by forked processes, unlike other memory: each block is checked once.
        self._checked = mmap.mmap(-1, max(1, len(sizes)))

    def __len__(self) -> int:
        return self._starts[-1]

    def table(self) -> SampleTable:
        """Returns all rows; a value is read when it is asked for."""
        columns = {name: _MappedColumn(self, name) for name in (*NUMBERS, *TEXTS)}
        return SampleTable(shard=_ShardColumn(self), **columns)

    def check_all(self) -> None:
        """Checks every block. Raises ShardCorrupt for the first wrong one."""
        for number in range(len(self._table)):
            self._check(number)

    def find(self, row: int) -> tuple[SampleBlock, int]:
        """Returns the block of a row, and the row's place in it.

        Raises:
            IndexError: there is no such row.
            ShardCorrupt: the block is damaged, or one of its values is not allowed.
            OSError: the storage fails.
        """
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        number = bisect_right(self._starts, row) - 1
        return self._block(number), row - self._starts[number]

    def parts(self, name: str, start: int, stop: int) -> Iterator[Any]:
        """Yields the values of the rows [start, stop) of a column, block by block."""
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            first, end = self._starts[number], min(stop, self._starts[number + 1])
            yield self._block(number).values(name, start - first, end - first)
            start, number = end, number + 1

    def shards_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the shard of each row, int32."""
        numbers = np.searchsorted(self._blocks.starts, rows, side="right") - 1
        return self._blocks.shards[numbers].astype(np.int32)

    def _block(self, number: int) -> SampleBlock:
        block = self._recent.get(number)
        if block is None:
            block = self._view(number) if self._checked[number] else self._check(number)
            if len(self._recent) >= RECENT_BLOCKS:
                self._recent.clear()
            self._recent[number] = block
        return block

    def _view(self, number: int) -> SampleBlock:
        start, end = self._positions[number : number + 2].tolist()
        first, stop = self._starts[number : number + 2]
        return SampleBlock(self._content[start:end], stop - first, first, self.where)

    def _check(self, number: int) -> SampleBlock:
        # Read, not mapped: a damaged disk or a truncated file gives an error here, where reading
        # mapped memory would kill the process.
        content = self._read(*self._positions[number : number + 2].tolist())
        if hashlib.sha256(content).digest() != self._table["sha256"][number].tobytes():
            if self._copy is not None:
                with suppress(OSError):
                    os.unlink(self._copy)  # the next start downloads it again
            raise ShardCorrupt(
                f"{self.where}: the rows from {self._starts[number]} on are damaged: their sha256"
                " differs from the one in the file's table; copy the data set again, or pack it"
                " again"
            )
        num_bytes = self._files.num_bytes[int(self._blocks.shards[number])]
        block = self._view(number)
        block.check(num_bytes, is_tar=self._files.is_tar, where=self.where)
        self._checked[number] = 1
        return block

    def _open(self, store: Storage, name: str, entry: RowsFile, node_folder: str | None) -> None:
        self._content: memoryview
        if store.is_in_memory:
            content = store.read(name)
            self._check_size(len(content), entry)
            self._content = memoryview(content)
            return
        path = store.path(name)
        if not store.is_local:
            path = copy_to_node(store, name, entry, self._blocks, node_folder)
            self._copy = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._check_size(os.fstat(self._descriptor).st_size, entry)
        self._content = memoryview(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ))

    def _check_size(self, num_bytes: int, entry: RowsFile) -> None:
        if num_bytes != entry.num_bytes:
            raise ShardCorrupt(
                f"{self.where}: has {num_bytes} bytes, {entry.num_bytes} in manifest.json; copy the"
                " data set again, or pack it again"
            )

    def _read(self, start: int, end: int) -> bytes:
        if self._descriptor < 0:
            return bytes(self._content[start:end])

        def pread() -> bytes:
            # A system call returns at most 2 GiB.
            pieces = [
                os.pread(self._descriptor, min(1 << 30, end - at), at)
                for at in range(start, end, 1 << 30)
            ]
            return b"".join(pieces)

        return Retries().call(pread, self.where, LOCAL_ATTEMPTS)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)


class _RowColumn:
    """What all columns of a file of rows share; see `Column`."""

    def __init__(self, rows: MappedRows) -> None:
        self._rows = rows

    def _value(self, row: int) -> Any:
        raise NotImplementedError

    def _array(self, start: int, stop: int) -> np.ndarray:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any, /) -> Any:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return self._array(start, max(start, stop))
            rows = np.arange(start, stop, step)
        if isinstance(rows, int | np.integer):
            return self._value(operator.index(rows))
        wanted = np.asarray(rows)
        if wanted.dtype == bool:
            wanted = np.flatnonzero(wanted)
        values = np.empty(len(wanted), dtype=self._array(0, 0).dtype)
        values[:] = [self._value(row) for row in wanted.tolist()]
        return values

    def __iter__(self) -> Iterator[Any]:
        for chunk in self._chunks():
            yield from chunk

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._array(0, len(self)), dtype=dtype)

    def tolist(self) -> list[Any]:
        return self._array(0, len(self)).tolist()

    def sum(self) -> Any:
        return sum((chunk.sum() for chunk in self._chunks()), np.int64(0))

    def max(self) -> Any:
        return max(chunk.max() for chunk in self._chunks())

    def argmax(self) -> int:
        best, at, start = None, 0, 0
        for chunk in self._chunks():
            if best is None or chunk.max() > best:
                best, at = chunk.max(), start + int(chunk.argmax())
            start += len(chunk)
        return at

    def _chunks(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), CHUNK_ROWS):
            yield self._array(start, min(start + CHUNK_ROWS, len(self)))


class _MappedColumn(_RowColumn):
    """A stored column."""

    def __init__(self, rows: MappedRows, name: str) -> None:
        super().__init__(rows)
        self._name = name
        self._read: Callable[[SampleBlock, int], Any]
        if name in NUMBERS:
            self._read = lambda block, at: block.numbers[name][at]
        else:
            self._read = lambda block, at: block.text(name, at)

    def _value(self, row: int) -> Any:
        return self._read(*self._rows.find(row))

    def _array(self, start: int, stop: int) -> np.ndarray:
        parts = self._rows.parts(self._name, start, stop)
        if self._name in NUMBERS:
            return np.concatenate([np.empty(0, NUMBERS[self._name]), *parts])
        return text_array([text for part in parts for text in part])


class _ShardColumn(_RowColumn):
    """The shard of each row, which follows from the sizes of the shards."""

    def _value(self, row: int) -> Any:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self._rows.shards_of(np.array([row % len(self)]))[0]

    def _array(self, start: int, stop: int) -> np.ndarray:
        return self._rows.shards_of(np.arange(start, stop))
