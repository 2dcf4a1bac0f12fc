"""The file of a data set's rows, `samples.rows`: blocks of columns that can be mapped into memory.

All numbers are little-endian, and every part begins at a multiple of 64 bytes.

    header   64 bytes: magic, version of this file format, most rows of a block
    blocks   the rows of a shard; a shard of more than BLOCK_ROWS rows has several blocks
    table    per block: its size in bytes and its number of rows (uint64 each), and its sha256

A block holds 64 bytes (numbers of rows, of bytes of keys, of bytes of video ids; uint32 each), the
columns of NUMBERS, the end of each key and of each video_id (uint32), and their texts as UTF-8.

`manifest.json` holds the size of the file, and the sha256 of header and table. A reader therefore
opens the file without reading the blocks, and checks a block when it first reads one of its rows.
The rows of a shard lie together, because the order of samples reads a few shards at a time.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from tvr.data_prep.dataset.index_rules import check_numbers, check_texts, refuse
from tvr.data_prep.dataset.sample_table import SampleTable
from tvr.data_prep.records import ShardCorrupt
from tvr.data_prep.storage.retries import Retries
from tvr.data_prep.storage.storage import partial_name

MAGIC = b"TVR ROWS"
ROWS_VERSION = 1
BLOCK_ROWS = 1 << 14
ALIGNMENT = 64
HEADER = struct.Struct("<8sII48x")
BLOCK_HEADER = struct.Struct("<III52x")
TABLE_ENTRY = np.dtype([("num_bytes", "<u8"), ("num_rows", "<u8"), ("sha256", "V32")])

NUMBERS = {
    "offset": np.dtype("<i8"),
    "length": np.dtype("<i8"),
    "content": np.dtype("<u8"),
    "crc32": np.dtype("<u4"),
    "num_captions": np.dtype("<i4"),
}
TEXTS = ("key", "video_id")
TEXT_END = np.dtype("<u4")


class RowsFile(NamedTuple):
    """What `manifest.json` holds about a file of rows."""

    num_bytes: int
    sha256: str
    """Of header and table."""


class BlockRows(NamedTuple):
    """The division of a data set's rows into blocks; a pure function of the shards' sizes."""

    starts: np.ndarray
    """First row of each block, then the number of rows; int64."""
    shards: np.ndarray
    """Shard of each block."""

    @property
    def table_bytes(self) -> int:
        """Size of the file's table."""
        return len(self.shards) * TABLE_ENTRY.itemsize


def divide_rows(shard_sizes: Sequence[int]) -> BlockRows:
    """Divides the rows of shards with these numbers of samples into blocks."""
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    counts = -(-sizes // BLOCK_ROWS)
    shards = np.repeat(np.arange(len(sizes)), counts)
    within = np.arange(len(shards)) - np.repeat(np.cumsum(counts) - counts, counts)
    firsts = np.cumsum(sizes) - sizes
    return BlockRows(np.append(firsts[shards] + within * BLOCK_ROWS, sizes.sum()), shards)


class RowsWriter:
    """Writes a file of rows, shard by shard, in the memory of one block."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._table: list[tuple[int, int, bytes]] = []
        self._num_bytes = HEADER.size
        file.write(_header())

    def append(self, rows: SampleTable) -> None:
        """Appends the rows of one shard.

        Raises:
            UnicodeEncodeError: a text has no UTF-8 form.
        """
        for start in range(0, len(rows), BLOCK_ROWS):
            part = rows.rows(start, min(start + BLOCK_ROWS, len(rows)))
            block = encode_block(part)
            self._file.write(block)
            self._table.append((len(block), len(part), hashlib.sha256(block).digest()))
            self._num_bytes += len(block)

    def finish(self) -> RowsFile:
        """Writes the table. The caller closes the file."""
        table = np.array(self._table, dtype=TABLE_ENTRY).tobytes()
        self._file.write(table)
        return RowsFile(self._num_bytes + len(table), table_sha256(_header(), table))


def write_rows(fs: Any, path: str, shards: Iterable[SampleTable], sizes: Sequence[int]) -> RowsFile:
    """Writes a file of rows on an fsspec file system; `path` never names a part of it.

    Args:
        fs: File system.
        path: File to write.
        shards: Rows of each shard in turn; one of them is in memory at a time.
        sizes: Number of rows that each shard must have.

    Raises:
        ValueError: the numbers of rows differ from `sizes`.
    """
    if not isinstance(fs, LocalFileSystem):
        # A store gets the whole file at once: an upload that ends early leaves nothing behind.
        with tempfile.NamedTemporaryFile(prefix="tvr-rows-") as file:
            written = _write_shards(file, shards, sizes)
            file.flush()
            Retries().call(lambda: fs.put_file(file.name, path), path)
        return written
    partial = partial_name(path)
    try:
        with open(partial, "wb") as file:
            written = _write_shards(file, shards, sizes)
            file.flush()
            os.fsync(file.fileno())  # after a crash the renamed file must be whole
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(partial)
    return written


def _write_shards(file: Any, shards: Iterable[SampleTable], sizes: Sequence[int]) -> RowsFile:
    writer, count = RowsWriter(file), 0
    for count, rows in enumerate(shards, 1):
        if count > len(sizes) or len(rows) != sizes[count - 1]:
            expected = sizes[count - 1] if count <= len(sizes) else 0
            raise ValueError(f"shard {count - 1} has {len(rows)} rows, must have {expected}")
        writer.append(rows)
    if count != len(sizes):
        raise ValueError(f"rows of {count} shards, must be {len(sizes)}")
    return writer.finish()


def encode_block(rows: SampleTable) -> bytes:
    """Returns the rows as a block."""
    texts = {name: [str(text).encode() for text in getattr(rows, name)] for name in TEXTS}
    joined = {name: b"".join(values) for name, values in texts.items()}
    parts = [BLOCK_HEADER.pack(len(rows), *(len(joined[name]) for name in TEXTS))]
    parts += [np.asarray(getattr(rows, name)).astype(of).tobytes() for name, of in NUMBERS.items()]
    for values in texts.values():
        ends = np.cumsum([len(value) for value in values], dtype=np.int64)
        parts.append(ends.astype(TEXT_END).tobytes())
    return b"".join(part + bytes(-len(part) % ALIGNMENT) for part in (*parts, *joined.values()))


class SampleBlock:
    """The rows of a block; numbers are views of the given memory.

    Args:
        content: The block.
        num_rows: Rows that it must have.
        first_row: Number of its first row, for errors.
        where: Location of the file, for errors.

    Raises:
        ShardCorrupt: the block has another size.
    """

    __slots__ = ("_ends", "_texts", "first_row", "num_rows", "numbers")

    def __init__(self, content: memoryview, num_rows: int, first_row: int, where: str) -> None:
        self.first_row, self.num_rows = first_row, num_rows
        counts = (0, 0, 0)
        if len(content) >= BLOCK_HEADER.size:
            counts = BLOCK_HEADER.unpack_from(content)
        sizes = [num_rows * of.itemsize for of in NUMBERS.values()]
        sizes += [num_rows * TEXT_END.itemsize] * len(TEXTS) + list(counts[1:])
        expected = BLOCK_HEADER.size + sum(size + -size % ALIGNMENT for size in sizes)
        if counts[0] != num_rows or len(content) != expected:
            allowed = f"{num_rows} rows in {expected} bytes"
            refuse(where, f"block of row {first_row}", (counts[0], len(content)), allowed)
        at, columns = BLOCK_HEADER.size, []
        for size in sizes:
            columns.append(content[at : at + size])
            at += size + -size % ALIGNMENT
        self.numbers = {
            name: np.frombuffer(column, of)
            for (name, of), column in zip(NUMBERS.items(), columns, strict=False)
        }
        ends = columns[len(NUMBERS) : len(NUMBERS) + len(TEXTS)]
        self._ends = {n: np.frombuffer(e, TEXT_END) for n, e in zip(TEXTS, ends, strict=True)}
        self._texts = dict(zip(TEXTS, columns[-len(TEXTS) :], strict=True))

    def check(self, file_bytes: int, *, is_tar: bool, where: str) -> None:
        """Checks the values of all rows.

        Args:
            file_bytes: Size of the file that holds the samples.
            is_tar: The samples lie in a tar file, hence in whole blocks of tar.
            where: Location of the rows, for errors.

        Raises:
            ShardCorrupt: a value is not allowed; the message names the first such row.
        """
        sizes = np.int64(file_bytes)
        check_numbers(self.numbers, sizes, self.first_row, is_tar=is_tar, where=where)
        for name in TEXTS:
            check_texts(name, bytes(self._texts[name]), self._ends[name], self.first_row, where)

    def text(self, name: str, at: int) -> str:
        """A text by its place in the block."""
        ends = self._ends[name]
        return str(self._texts[name][int(ends[at - 1]) if at else 0 : int(ends[at])], "utf-8")

    def values(self, name: str, start: int, stop: int) -> Any:
        """Values of a column from `start` to `stop` of the block: an array, or a list of texts."""
        if name in self.numbers:
            return self.numbers[name][start:stop]
        return [self.text(name, at) for at in range(start, stop)]


def table_sha256(header: bytes, table: bytes) -> str:
    """Returns the sha256 that identifies a file of rows."""
    return hashlib.sha256(header + table).hexdigest()


def read_table(
    header: bytes, table: bytes, entry: RowsFile, blocks: BlockRows, where: str
) -> np.ndarray:
    """Checks header and table of a file of rows.

    Args:
        header: First HEADER.size bytes of the file.
        table: Last `blocks.table_bytes` bytes of the file.
        entry: Size and hash of the file by `manifest.json`.
        blocks: Blocks that the shards need.
        where: Location of the file, for errors.

    Returns:
        The table, an array of TABLE_ENTRY.

    Raises:
        ShardCorrupt: they differ from the ones that `manifest.json` names, are of another version
            of the format, or disagree with the size of the file.
    """
    if table_sha256(header, table) != entry.sha256:
        raise ShardCorrupt(f"{where}: sha256 differs from the one in manifest.json")
    magic, version, block_rows = HEADER.unpack(header)
    if (magic, version, block_rows) != (MAGIC, ROWS_VERSION, BLOCK_ROWS):
        allowed = f"{(MAGIC, ROWS_VERSION, BLOCK_ROWS)}"
        refuse(where, "magic, version, rows of a block", (magic, version, block_rows), allowed)
    entries = np.frombuffer(table, TABLE_ENTRY)
    sizes, blocks_bytes = entries["num_bytes"], entry.num_bytes - HEADER.size - len(table)
    total = sum(sizes.tolist())  # numpy's sum might overflow
    if (sizes > blocks_bytes).any() or (sizes % ALIGNMENT).any() or total != blocks_bytes:
        allowed = f"multiples of {ALIGNMENT} with the sum {blocks_bytes}"
        refuse(where, "sizes of blocks", sizes.tolist()[:20], allowed)
    if (entries["num_rows"] != np.diff(blocks.starts)).any():
        raise ShardCorrupt(f"{where}: manifest.json and the rows disagree on the samples per shard")
    return entries


def _header() -> bytes:
    return HEADER.pack(MAGIC, ROWS_VERSION, BLOCK_ROWS)
