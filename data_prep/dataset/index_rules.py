"""What the files of an index may say. Each value is checked before anything is done with it.

An index may come from anyone. Names of files become paths and names in the node's cache, sizes
become memory, and texts reach logs and pages, so each has a pattern, a type and a range.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from tvr.data_prep.records import (
    BAD_SAMPLE_REASONS,
    KEY_PATTERN,
    MAX_KEY_LENGTH,
    MAX_VIDEO_ID_LENGTH,
    REFUSED_TEXT,
    VIDEO_ID_RULE,
    ShardCorrupt,
    is_video_id,
)

# A plain name within the data set's folder: no separator, drive, URL, hidden file or "..".
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
SHA256 = re.compile(r"[0-9a-f]{64}")
TAR_BLOCK = 512
# The size field of a tar header.
MAX_SAMPLE_BYTES = 1 << 33
MAX_FILE_BYTES = 1 << 50
MAX_COUNT = 1 << 40
# Samples of a data set: the table of its blocks of rows takes memory before it is read.
MAX_SAMPLES = 1 << 32
MAX_GENERATION = 10**6
MAX_FRAMES = 10**5
MAX_SIDE = 1 << 16
MAX_TEXT = 200
MAX_MANIFEST_BYTES = 1 << 28
KEY_BYTES = re.compile(rb"[A-Za-z0-9_-]*")
"""Any number of keys, one after another."""

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


PACK_AGAIN = "copy the data set again, or pack it again"


def refuse(
    where: str, name: str, value: object, allowed: str, remedy: str = PACK_AGAIN
) -> NoReturn:
    """Raises ShardCorrupt for a value of an index."""
    shown = repr(value)
    shown = shown if len(shown) <= MAX_TEXT else f"{shown[:MAX_TEXT]}..."
    raise ShardCorrupt(f"{where}: damaged or edited: {name}={shown} must be {allowed}; {remedy}")


class IndexFields:
    """The fields of a JSON object in an index.

    Its methods return a field's value, and raise ShardCorrupt for one that is not allowed.

    Args:
        values: The object.
        where: Location of the index, for errors.
        path: Name of the object within the index, such as "shards[3].".
        remedy: What to do about a damaged one, for errors.
    """

    def __init__(
        self, values: object, where: str, path: str = "", remedy: str = PACK_AGAIN
    ) -> None:
        if not isinstance(values, dict):
            refuse(where, path.rstrip(".") or "the content", values, "a JSON object", remedy)
        self._values: dict[str, Any] = values
        self._where = where
        self._path = path
        self._remedy = remedy

    @property
    def names(self) -> list[str]:
        """Names of the fields, sorted."""
        return sorted(self._values)

    def child(self, name: str) -> IndexFields:
        """An object."""
        return IndexFields(self[name], self._where, f"{self._path}{name}.", self._remedy)

    def children(self, name: str, *, least: int = 1) -> list[IndexFields]:
        """A list of objects, `least` at least."""
        values = self[name]
        if not isinstance(values, list) or len(values) < least:
            self.refuse(name, values, "a list of JSON objects")
        return [
            IndexFields(value, self._where, f"{self._path}{name}[{number}].", self._remedy)
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
        refuse(self._where, f"{self._path}{name}", value, allowed, self._remedy)

    def boolean(self, name: str) -> bool:
        """True or false."""
        value = self[name]
        if type(value) is not bool:
            self.refuse(name, value, "true or false")
        return value

    def integer(self, name: str, least: int, most: int) -> int:
        """A whole number from `least` to `most`."""
        value = self[name]
        if type(value) is not int or not least <= value <= most:
            self.refuse(name, value, f"a whole number from {least} to {most}")
        return value

    def optional_integer(self, name: str, least: int, most: int) -> int | None:
        """A whole number, or null."""
        return None if self[name] is None else self.integer(name, least, most)

    def text(self, name: str, most: int = MAX_TEXT) -> str:
        """A text of at most `most` characters, none for control."""
        value = self[name]
        if not isinstance(value, str) or len(value) > most or REFUSED_TEXT.search(value):
            self.refuse(name, value, f"a text of at most {most} characters, none for control")
        return value

    def optional_text(self, name: str) -> str | None:
        """A short text without control characters, or null."""
        return None if self[name] is None else self.text(name)

    def matching(self, name: str, pattern: re.Pattern[str], allowed: str) -> str:
        """A text that matches a pattern, which `allowed` describes."""
        value = self[name]
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self.refuse(name, value, allowed)
        return value

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """One of some texts."""
        value = self[name]
        if not isinstance(value, str) or value not in allowed:
            self.refuse(name, value, " or ".join(allowed))
        return value

    def sha256(self, name: str) -> str:
        """64 hexadecimal digits; such a text names a file in the node's cache."""
        return self.matching(name, SHA256, "64 lower-case hexadecimal digits")

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


def check_rows(
    columns: Mapping[str, Any], file_bytes: int | np.ndarray, *, is_tar: bool, where: str
) -> None:
    """Checks numbers and texts of rows in memory.

    Args:
        columns: Columns of a `SampleTable` by name.
        file_bytes: Size of the file that holds each row's sample.
        is_tar: The samples lie in tar files, hence in whole blocks.
        where: Location of the rows, for errors.

    Raises:
        ShardCorrupt: a value is not allowed; the message names the first such row.
        UnicodeEncodeError: a text has no UTF-8 form.
    """
    check_numbers(columns, np.asarray(file_bytes), 0, is_tar=is_tar, where=where)
    for name in TEXT_COLUMNS:
        texts = [str(text).encode() for text in columns[name]]
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        check_texts(name, b"".join(texts), ends, 0, where)


def check_numbers(
    numbers: Mapping[str, np.ndarray],
    file_bytes: np.ndarray | np.int64,
    first_row: int,
    *,
    is_tar: bool,
    where: str,
) -> None:
    """Checks the byte ranges and the counts of captions of rows; see `check_rows`."""
    length = numbers["length"]
    step = TAR_BLOCK if is_tar else 1
    for name, least, most in (
        ("length", step, np.minimum(file_bytes, MAX_SAMPLE_BYTES)),
        # No overflow: the length was checked.
        ("offset", 0, file_bytes - length),
        # Each caption is a text in the sample's JSON.
        ("num_captions", 0, length),
    ):
        values = numbers[name]
        valid = (values >= least) & (values <= most)
        if name != "num_captions":
            valid &= values % step == 0
        if not valid.all():
            at = int(np.flatnonzero(~valid)[0])
            allowed = {
                "length": "a sample's bytes within its file",
                "offset": "such that offset + length lies within the file",
                "num_captions": "0 or more, and at most the sample's bytes",
            }
            refuse(where, f"{name} of row {first_row + at}", values[at].item(), allowed[name])


def check_texts(
    name: str,
    texts: bytes,
    ends: np.ndarray,
    first_row: int,
    where: str,
    remedy: str = PACK_AGAIN,
) -> None:
    """Checks the texts of a column; see `check_rows`.

    Args:
        name: Column.
        texts: All texts as UTF-8.
        ends: End of each text in `texts`.
    """
    starts = np.append(0, ends[:-1]).astype(np.int64)
    lengths = ends.astype(np.int64) - starts
    if len(ends) and ((lengths < 0).any() or ends[-1] != len(texts)):
        at = int(np.flatnonzero(lengths < 0)[0]) if (lengths < 0).any() else len(ends) - 1
        end = f"end of {name} of row {first_row + at}"
        refuse(where, end, int(ends[at]), "within its texts", remedy)
    if not len(ends) or _are_texts(name, texts, starts, lengths):
        return
    # Text by text, to name the row. A long text of many bytes may still be valid.
    for at, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        shown = content = texts[start : start + length]
        try:
            shown = content.decode()
        except UnicodeDecodeError:
            pass
        is_valid = KEY_PATTERN.fullmatch if name == "key" else is_video_id
        if not isinstance(shown, str) or not is_valid(shown):
            allowed = f"match {KEY_PATTERN.pattern}" if name == "key" else VIDEO_ID_RULE
            refuse(where, f"{name} of row {first_row + at}", shown, allowed, remedy)


def _are_texts(name: str, texts: bytes, starts: np.ndarray, lengths: np.ndarray) -> bool:
    """True if all texts are valid, found without a loop over them; False if one may not be."""
    if lengths.min() < 1 or lengths.max() > TEXT_COLUMNS[name]:
        return False
    if name == "key":
        return KEY_BYTES.fullmatch(texts) is not None
    try:
        text = texts.decode()
    except UnicodeDecodeError:
        return False
    # A text must not begin within a character.
    begins = np.frombuffer(texts, dtype=np.uint8)[starts]
    return REFUSED_TEXT.search(text) is None and not ((begins & 0xC0) == 0x80).any()
