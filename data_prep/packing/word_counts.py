"""Counts of clips by word form: the idf of the words of a data set, in arrays.

A form is kept as its 64-bit hash. 16 bytes a form in a file that all processes map replace a dict
that each process would hold; of ten million captions it would take hundreds of megabytes. Two
forms of one data set share a hash with a chance of about one in a million, and then share a count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

# Hashes that wait to be merged into the counts, and forms whose hash is kept at hand.
BUFFER_HASHES = 1 << 20
KEPT_HASHES = 1 << 18


class WordCounter:
    """Counts in how many clips each form occurs, in memory that grows with the vocabulary only."""

    def __init__(self) -> None:
        self._hashes = np.empty(0, dtype=np.uint64)
        self._counts = np.empty(0, dtype=np.uint64)
        self._buffer: list[int] = []
        self._kept: dict[str, int] = {}
        self._num_clips = 0

    def add(self, forms: Iterable[str]) -> None:
        """Counts the forms of one clip, each of them once."""
        self._num_clips += 1
        kept = self._kept
        for form in set(forms):
            number = kept.get(form)
            if number is None:
                number = hash_form(form)
                if len(kept) < KEPT_HASHES:
                    kept[form] = number
            self._buffer.append(number)
        if len(self._buffer) >= BUFFER_HASHES:
            self._merge()

    def finish(self) -> WordCounts:
        """Returns the counts."""
        self._merge()
        return WordCounts(self._num_clips, np.stack([self._hashes, self._counts]))

    def _merge(self) -> None:
        new, counts = np.unique(np.array(self._buffer, dtype=np.uint64), return_counts=True)
        self._buffer.clear()
        hashes = np.concatenate([self._hashes, new])
        both = np.concatenate([self._counts, counts.astype(np.uint64)])
        order = np.argsort(hashes, kind="stable")
        hashes, both = hashes[order], both[order]
        is_first = np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(hashes)]
        starts = np.flatnonzero(is_first)
        self._hashes = hashes[starts]
        self._counts = np.add.reduceat(both, starts) if len(starts) else both


class WordCounts:
    """Number of clips that contain a form.

    Args:
        num_clips: Clips of the data set.
        table: (2, V) uint64: ascending hashes of the forms, and their counts.
    """

    def __init__(self, num_clips: int, table: np.ndarray, path: Path | None = None) -> None:
        self.num_clips = num_clips
        self.table = table
        self._path = path

    @classmethod
    def map_file(cls, num_clips: int, path: Path) -> WordCounts:
        """Maps a table that `write` stored. Other processes that receive the object map it, too."""
        size = path.stat().st_size
        table = np.memmap(path, np.uint64, "r").reshape(2, -1) if size else _EMPTY
        return cls(num_clips, table, path)

    def write(self, path: Path) -> None:
        """Stores the table."""
        path.write_bytes(np.ascontiguousarray(self.table).tobytes())

    def __getitem__(self, form: str) -> int:
        hashes, counts = self.table
        number = np.uint64(hash_form(form))
        place = int(np.searchsorted(hashes, number))
        found = place < len(hashes) and hashes[place] == number
        return int(counts[place]) if found else 0

    def __reduce__(self) -> tuple[Any, ...]:
        if self._path is not None:
            return WordCounts.map_file, (self.num_clips, self._path)
        return WordCounts, (self.num_clips, self.table)


_EMPTY = np.empty((2, 0), dtype=np.uint64)


def hash_form(form: str) -> int:
    """Returns 64 bits of a form, the same in every process and release."""
    digest = hashlib.blake2b(form.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
