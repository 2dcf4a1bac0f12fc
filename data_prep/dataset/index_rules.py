"""What the files of an index may say. Each value is checked before anything is done with it.

An index may come from anyone. Names of files become paths and names in the node's cache, sizes
become memory, and texts reach logs and pages, so each has a pattern, a type and a range.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.lib import format as npy

from tvr.data_prep.records import (
    BAD_SAMPLE_REASONS,
    KEY_PATTERN,
    MAX_KEY_LENGTH,
    MAX_VIDEO_ID_LENGTH,
    REFUSED_TEXT,
    VIDEO_ID_RULE,
    ShardCorrupt,
)

# A plain name within the data set's folder: no separator, drive, URL, hidden file or "..".
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
SHA256 = re.compile(r"[0-9a-f]{64}")
TAR_BLOCK = 512
# The size field of a tar header.
MAX_SAMPLE_BYTES = 1 << 33
MAX_FILE_BYTES = 1 << 50
MAX_COUNT = 1 << 40
MAX_GENERATION = 10**6
MAX_FRAMES = 10**5
MAX_SIDE = 1 << 16
MAX_TEXT = 200
MAX_MANIFEST_BYTES = 1 << 28
MAX_COLUMNS_BYTES = 1 << 34
"""Of all columns together, unpacked."""
CHECKED_ROWS = 1 << 16  # at a time, which bounds the memory of a check

COLUMN_TYPES: Mapping[str, np.dtype[Any]] = {
    "shard": np.dtype(np.int32),
    "offset": np.dtype(np.int64),
    "length": np.dtype(np.int64),
    "crc32": np.dtype(np.uint32),
    "num_captions": np.dtype(np.int32),
    "content": np.dtype(np.uint64),
}
TEXT_COLUMNS = {"key": MAX_KEY_LENGTH, "video_id": MAX_VIDEO_ID_LENGTH}
"""Longest text of each column of texts, in characters."""


def refuse(where: str, name: str, value: object, allowed: str) -> NoReturn:
    """Raises ShardCorrupt for a value of an index."""
    shown = repr(value)
    shown = shown if len(shown) <= MAX_TEXT else f"{shown[:MAX_TEXT]}..."
    raise ShardCorrupt(
        f"{where}: damaged or edited: {name}={shown} must be {allowed}; copy the data set again,"
        " or pack it again"
    )


class IndexFields:
    """The fields of a JSON object in an index.

    Its methods return a field's value, and raise ShardCorrupt for one that is not allowed.

    Args:
        values: The object.
        where: Location of the index, for errors.
        path: Name of the object within the index, such as "shards[3].".
    """

    def __init__(self, values: object, where: str, path: str = "") -> None:
        if not isinstance(values, dict):
            refuse(where, path.rstrip(".") or "the content", values, "a JSON object")
        self._values: dict[str, Any] = values
        self._where = where
        self._path = path

    def child(self, name: str) -> IndexFields:
        """An object."""
        return IndexFields(self[name], self._where, f"{self._path}{name}.")

    def children(self, name: str) -> list[IndexFields]:
        """A list of objects, at least one."""
        values = self[name]
        if not isinstance(values, list) or not values:
            self.refuse(name, values, "a list of JSON objects")
        return [
            IndexFields(value, self._where, f"{self._path}{name}[{number}].")
            for number, value in enumerate(values)
        ]

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise ShardCorrupt(
                f"{self._where}: damaged or edited: KeyError: {self._path}{name} is missing"
            )
        return self._values[name]

    def refuse(self, name: str, value: object, allowed: str) -> NoReturn:
        """Raises ShardCorrupt for a field."""
        refuse(self._where, f"{self._path}{name}", value, allowed)

    def integer(self, name: str, least: int, most: int) -> int:
        """A whole number from `least` to `most`."""
        value = self[name]
        if type(value) is not int or not least <= value <= most:
            self.refuse(name, value, f"a whole number from {least} to {most}")
        return value

    def optional_integer(self, name: str, least: int, most: int) -> int | None:
        """A whole number, or null."""
        return None if self[name] is None else self.integer(name, least, most)

    def text(self, name: str) -> str:
        """A short text without control characters."""
        value = self[name]
        if not isinstance(value, str) or len(value) > MAX_TEXT or REFUSED_TEXT.search(value):
            self.refuse(name, value, f"a text of at most {MAX_TEXT} characters, none for control")
        return value

    def optional_text(self, name: str) -> str | None:
        """A short text without control characters, or null."""
        return None if self[name] is None else self.text(name)

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """One of some texts."""
        value = self[name]
        if not isinstance(value, str) or value not in allowed:
            self.refuse(name, value, " or ".join(allowed))
        return value

    def sha256(self, name: str) -> str:
        """64 hexadecimal digits; such a text names a file in the node's cache."""
        value = self[name]
        if not isinstance(value, str) or not SHA256.fullmatch(value):
            self.refuse(name, value, "64 lower-case hexadecimal digits")
        return value

    def file_name(self, name: str, suffix: str) -> str:
        """The plain name of a file in the data set's folder."""
        value = self[name]
        if (
            not isinstance(value, str)
            or not FILE_NAME.fullmatch(value)
            or ".." in value
            or not value.endswith(suffix)
        ):
            self.refuse(name, value, f"the plain name of a file in this folder, ending in {suffix}")
        return value

    def shard(self, suffix: str) -> dict[str, Any]:
        """The fields of a `Shard`, this object being one."""
        unknown = sorted(self._values.keys() - {"name", "num_samples", "shard_bytes", "sha256"})
        if unknown:
            self.refuse(unknown[0], self._values[unknown[0]], "absent")
        shard_bytes = self.integer("shard_bytes", 1, MAX_FILE_BYTES)
        # Each sample has at least one block of a tar, or a count and an empty JSON.
        most = shard_bytes // (TAR_BLOCK if suffix == ".tar" else 4)
        return {
            "name": self.file_name("name", suffix),
            "num_samples": self.integer("num_samples", 1, most),
            "shard_bytes": shard_bytes,
            "sha256": self.sha256("sha256"),
        }

    def bad_counts(self, name: str) -> dict[str, int]:
        """Clips refused by packing, by reason."""
        counts = self.child(name)
        for reason in counts._values:
            if reason not in BAD_SAMPLE_REASONS:
                self.refuse(name, reason, f"counts of {', '.join(BAD_SAMPLE_REASONS)}")
        return {reason: counts.integer(reason, 0, MAX_COUNT) for reason in counts._values}


def generation_of(values: Mapping[str, Any], where: str) -> int:
    """Returns a manifest's generation, which later file names contain; 0 for the first format."""
    return IndexFields({"generation": 0, **values}, where).integer("generation", 0, MAX_GENERATION)


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


def check_rows(
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
        _check(rows["shard"], _within(rows["shard"], len(file_bytes)), "shard", start, where)
        ends = file_bytes[rows["shard"]]
        step = TAR_BLOCK if is_tar else 1
        for name, least, most in (
            ("length", step, np.minimum(ends, MAX_SAMPLE_BYTES)),
            # No overflow: the length was checked.
            ("offset", 0, ends - rows["length"]),
            # Each caption is a text in the sample's JSON.
            ("num_captions", 0, rows["length"]),
        ):
            values = rows[name]
            valid = (values >= least) & (values <= most)
            if name != "num_captions":
                valid &= values % step == 0
            _check(values, valid, name, start, where)
        for name in TEXT_COLUMNS:
            _check_texts(rows[name], name, start, where)


def _within(values: np.ndarray, count: int) -> np.ndarray:
    return (values >= 0) & (values < count)


def _check(values: np.ndarray, valid: np.ndarray, name: str, start: int, where: str) -> None:
    if not valid.all():
        row = int(np.flatnonzero(~valid)[0])
        allowed = {
            "shard": "the number of a shard",
            "length": "a sample's bytes within its file",
            "offset": "such that offset + length lies within the file",
            "num_captions": "0 or more, and at most the sample's bytes",
        }
        refuse(where, f"{name} of row {start + row}", values[row].item(), allowed[name])


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
