"""Reads the rows of a data set of format 2: compressed columns of numpy, in `samples.npz`.

Only `tvr upgrade` reads them. Such a file may come from anyone, too.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib import format as npy

from tvr.data_prep.dataset.index_rules import (
    COLUMN_TYPES,
    TEXT_COLUMNS,
    check_numbers,
    refuse,
)
from tvr.data_prep.records import KEY_PATTERN, VIDEO_ID_RULE, ShardCorrupt

MAX_COLUMNS_BYTES = 1 << 34
"""Of all columns together, unpacked."""
CHECKED_ROWS = 1 << 16  # at a time, which bounds the memory of a check


def read_columns(content: bytes, num_rows: int, where: str) -> dict[str, np.ndarray]:
    """Reads the columns from the content of an npz file.

    Types, lengths and sizes are read from the headers, and checked, before memory is taken. No
    pickle is read.

    Raises:
        ShardCorrupt: a column is missing or differs from what `num_rows` rows need.
    """
    names = {f"{name}.npy": name for name in (*TEXT_COLUMNS, *COLUMN_TYPES)}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if sorted(entry.filename for entry in entries) != sorted(names):
                found = [entry.filename for entry in entries[: 2 * len(names)]]
                refuse(where, "columns", found, ", ".join(sorted(names)))
            num_bytes = sum(entry.file_size for entry in entries)
            if num_bytes > MAX_COLUMNS_BYTES:
                refuse(where, "bytes", num_bytes, f"at most {MAX_COLUMNS_BYTES} when unpacked")
            # Checked for all columns first: a wrong header costs no memory.
            types = {e.filename: _column_type(archive, e, num_rows, where) for e in entries}
            columns = {}
            for entry in entries:
                with archive.open(entry) as file:
                    dtype, header_bytes = types[entry.filename]
                    file.read(header_bytes)
                    values = np.empty(num_rows, dtype)
                    _read_into(file, values.view(np.uint8).data)
                    file.read(1)  # at the end, zipfile compares the checksum
                    columns[names[entry.filename]] = values
            return columns
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise ShardCorrupt(f"{where}: damaged or edited: {error!r}") from error
    except RuntimeError as error:  # an encrypted file
        raise ShardCorrupt(f"{where}: damaged or edited: {error!r}") from error


def _column_type(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, num_rows: int, where: str
) -> tuple[np.dtype[Any], int]:
    """Returns the type of a column, and the bytes before its values."""
    name = entry.filename.removesuffix(".npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        refuse(where, f"compression of {name}", entry.compress_type, "stored or deflated")
    with archive.open(entry) as file:
        major, minor = npy.read_magic(file)
        if (major, minor) != (1, 0):
            refuse(where, f"version of {name}", (major, minor), "(1, 0)")
        shape, _, dtype = npy.read_array_header_1_0(file)
        header_bytes = file.tell()
    if shape != (num_rows,):
        allowed = f"({num_rows},): index and columns disagree on the samples per shard"
        refuse(where, f"shape of {name}", shape, allowed)
    if name in TEXT_COLUMNS:
        longest = TEXT_COLUMNS[name]
        if dtype.kind != "U" or not dtype.isnative or not 4 <= dtype.itemsize <= 4 * longest:
            refuse(where, f"type of {name}", dtype, f"texts of 1 to {longest} characters")
    elif dtype != COLUMN_TYPES[name]:
        refuse(where, f"type of {name}", dtype, str(COLUMN_TYPES[name]))
    expected = header_bytes + num_rows * dtype.itemsize
    if entry.file_size != expected:
        refuse(where, f"bytes of {name}", entry.file_size, f"{expected} for {num_rows} rows")
    return dtype, header_bytes


def _read_into(file: Any, view: memoryview) -> None:
    """Fills the memory from a file."""
    while view:
        got = file.readinto(view[: 1 << 24])
        if not got:
            raise EOFError("a column ends too early")
        view = view[got:]


def check_columns(
    columns: Mapping[str, np.ndarray], file_bytes: np.ndarray, *, is_tar: bool, where: str
) -> None:
    """Checks the values of all rows.

    Args:
        columns: From `read_columns`.
        file_bytes: Size of the file that holds each shard's samples.
        is_tar: The samples lie in tar files, hence in whole blocks.
        where: Location of the columns, for errors.

    Raises:
        ShardCorrupt: a value is not allowed; the message names the first such row.
    """
    for start in range(0, len(columns["key"]), CHECKED_ROWS):
        rows = {name: column[start : start + CHECKED_ROWS] for name, column in columns.items()}
        shards = rows["shard"]
        wrong = np.flatnonzero((shards < 0) | (shards >= len(file_bytes)))
        if len(wrong):
            at = int(wrong[0])
            name = f"shard of row {start + at}"
            refuse(where, name, shards[at].item(), "the number of a shard")
        check_numbers(rows, file_bytes[shards], start, is_tar=is_tar, where=where)
        for name in TEXT_COLUMNS:
            _check_texts(rows[name], name, start, where)


def _check_texts(values: np.ndarray, name: str, start: int, where: str) -> None:
    """Refuses a text that is empty, has a character that its column excludes, or hides one.

    numpy pads texts with NUL characters.
    """
    codes = np.ascontiguousarray(values).view(np.uint32).reshape(len(values), -1)
    padding = codes == 0
    if name == "key":
        refused = ~KEY_CODES[np.minimum(codes, len(KEY_CODES) - 1)] & ~padding
    else:
        refused = ((codes < 32) & ~padding) | ((codes >= 0x7F) & (codes < 0xA0))
        refused |= (codes == 0x2028) | (codes == 0x2029) | (codes > 0x10FFFF)
        refused |= (codes >= 0xD800) & (codes < 0xE000)
    refused[:, 1:] |= padding[:, :-1] & ~padding[:, 1:]
    valid = ~refused.any(axis=1) & ~padding[:, 0]
    if not valid.all():
        row = int(np.flatnonzero(~valid)[0])
        text = codes[row][~padding[row]].tolist()
        shown = "".join(chr(code) if code <= 0x10FFFF else "?" for code in text)
        allowed = f"match {KEY_PATTERN.pattern}" if name == "key" else VIDEO_ID_RULE
        refuse(where, f"{name} of row {start + row}", shown, allowed)


# Whether each character below 128 may be in a key; the last one stands for all others.
KEY_CODES = np.array([KEY_PATTERN.fullmatch(chr(code)) is not None for code in range(129)])
