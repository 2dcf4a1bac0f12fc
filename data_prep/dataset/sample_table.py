"""The rows of a data set in memory: one row per sample, in shard order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np


class Column(Protocol):
    """One value per row: a numpy array, or a column of a file of rows.

    A row number gives a value; a slice or an array of row numbers gives an array. Iterating over a
    column of a file holds a few thousand rows at a time.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __array__(self, dtype: Any = None, /) -> np.ndarray: ...

    def tolist(self) -> list[Any]:
        """All values as Python objects."""
        ...

    def sum(self) -> Any:
        """Sum of all values."""
        ...

    def max(self) -> Any:
        """Largest value."""
        ...

    def argmax(self) -> Any:
        """First row with the largest value."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleTable:
    """One row per sample, in shard order."""

    key: Column  # str
    video_id: Column  # str
    shard: Column  # int32, index in Manifest.shards; not stored, it follows from the shards' sizes
    offset: Column  # int64, first byte in the shard, a multiple of 512
    length: Column  # int64, bytes of the sample's tar members, a multiple of 512
    crc32: Column  # uint32 of these bytes
    num_captions: Column  # int32
    content: Column  # uint64, see `content_hash`

    def __len__(self) -> int:
        return len(self.key)

    def rows(self, start: int, stop: int) -> SampleTable:
        """Returns the rows [start, stop) as arrays."""
        return SampleTable(
            **{each.name: getattr(self, each.name)[start:stop] for each in fields(self)}
        )


def text_array(texts: Sequence[str]) -> np.ndarray:
    """Returns texts as an array of Python objects.

    numpy's own texts have the width of the longest one: a single text of 2,000 characters among ten
    million would take 80 GB.
    """
    values = np.empty(len(texts), dtype=object)
    values[:] = texts
    return values


def concat_samples(parts: Sequence[SampleTable]) -> SampleTable:
    """Concatenates the rows of shards and sets `shard` to the index of each part."""
    if not parts:
        return SampleTable(**{each.name: np.empty(0) for each in fields(SampleTable)})
    columns = {
        each.name: [np.asarray(getattr(part, each.name)) for part in parts]
        for each in fields(SampleTable)
    }
    columns["shard"] = [
        np.full(len(part), number, dtype=np.int32) for number, part in enumerate(parts)
    ]
    return SampleTable(**{name: np.concatenate(column) for name, column in columns.items()})


def hash_texts(texts: Column) -> np.ndarray:
    """Returns a 64-bit hash of each text, (N,) uint64.

    Hashes of millions of texts are compared in bounded memory, the texts themselves are not.
    """
    digests = b"".join(
        hashlib.blake2b(str(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for text in texts
    )
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64, copy=False)
