"""Rows of annotations on the local disk, in memory of a few numbers a row.

A row's line is appended to a file; its key, its video and its place become numbers in another one,
which is mapped. Rows of the same key are found by sorting these numbers.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from tvr.data_prep.annotations.clip_lines import SourceRow, decode_clip, encode_clip
from tvr.data_prep.annotations.same_key import Decision, decide_rows
from tvr.data_prep.records import Clip, RefusedRow

# Of a row: two words of the key's hash, two words of the video's seeded hash, place in the file of
# rows with FLAGS, and the row's `SourceRow.key_hash`.
NUMBERS_PER_ROW = 6
FLAG_BITS = 3
MAY_CONTINUE, HAS_VIDEO_ID, RENAMED = 1, 2, 4
FLAGS = MAY_CONTINUE | HAS_VIDEO_ID | RENAMED
# Rows of one key that are listed at a time.
CHUNK = 1 << 16
REPORT_EVERY = 10_000


class RowWriter:
    """Appends rows to a file of lines and a file of numbers."""

    def __init__(self, rows: BinaryIO, numbers: BinaryIO, seed: int) -> None:
        self._rows = rows
        self._numbers = numbers
        self._seed = seed.to_bytes(8, "little")
        self._place = 0

    def append(self, row: SourceRow) -> None:
        """Appends a row."""
        line = encode_clip(row.clip)
        name = row.clip.video.encode("utf-8", "surrogatepass")
        video = hashlib.blake2b(name, digest_size=16, key=self._seed).digest()
        flags = row.may_continue * MAY_CONTINUE | row.has_video_id * HAS_VIDEO_ID
        place = struct.pack("<QQ", self._place << FLAG_BITS | flags, row.key_hash)
        self._numbers.write(_key_digest(row.clip.key) + video + place)
        self._rows.write(line)
        self._place += len(line)


class RowSpool:
    """The rows as they came, read by their number."""

    def __init__(self, rows: BinaryIO, numbers: BinaryIO) -> None:
        rows.flush()
        numbers.flush()
        self._file = rows.fileno()
        size = os.fstat(numbers.fileno()).st_size
        self._numbers = (
            np.memmap(numbers, np.uint64, "r+").reshape(-1, NUMBERS_PER_ROW)  # type: ignore[call-overload]
            if size
            else np.empty((0, NUMBERS_PER_ROW), dtype=np.uint64)
        )
        end = np.array([os.fstat(self._file).st_size], dtype=np.uint64)
        self._places = np.concatenate([self._numbers[:, 4] >> np.uint64(FLAG_BITS), end])
        self._has_renamed = False

    def __len__(self) -> int:
        return len(self._numbers)

    def sort_by_key(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns `_sorted` of the keys' hashes."""
        return _sorted(self._numbers[:, 0], self._numbers[:, 1])

    def sort_by_video(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns `_sorted` of the videos' seeded hashes."""
        return _sorted(self._numbers[:, 2], self._numbers[:, 3])

    def first_own_key(self, rows: np.ndarray) -> int:
        """Returns the first of `rows` that gives its key itself, or else the first row."""
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            own = np.flatnonzero((self._numbers[part, 5] == 0) & ~self._is_renamed(part))
            if len(own):
                return int(part[own[0]])
        return int(rows[0])

    def rename(self, row: int) -> None:
        """Gives a row a key of its own, see `SourceRow.renamed`."""
        key = self.row(row).renamed().clip.key
        self._numbers[row, :2] = np.frombuffer(_key_digest(key), np.uint64)
        self._numbers[row, 4] |= np.uint64(RENAMED)
        self._has_renamed = True

    def row(self, row: int) -> SourceRow:
        """Reads a row."""
        flags = int(self._numbers[row, 4]) & FLAGS
        found = SourceRow(
            clip=decode_clip(self._stored_line(row)),
            may_continue=bool(flags & MAY_CONTINUE),
            key_hash=int(self._numbers[row, 5]),
            has_video_id=bool(flags & HAS_VIDEO_ID),
        )
        return found.renamed() if flags & RENAMED else found

    def clip(self, row: int) -> Clip:
        """Reads the clip of a row."""
        return self.row(row).clip

    def line(self, row: int) -> bytes:
        """Returns the line of a row."""
        if self._has_renamed and int(self._numbers[row, 4]) & RENAMED:
            return encode_clip(self.clip(row))
        return self._stored_line(row)

    def _is_renamed(self, rows: np.ndarray) -> np.ndarray:
        return (self._numbers[rows, 4] & np.uint64(RENAMED)) != 0

    def _stored_line(self, row: int) -> bytes:
        start = int(self._places[row])
        return os.pread(self._file, int(self._places[row + 1]) - start, start)


class RepeatedKeys:
    """Which rows continue the clip of an earlier row, and which are refused; see `same_key`.

    Args:
        refuse: Receives the number and the refusal of each refused row.
        max_refused: No more rows are compared once so many are refused.
        on_row: Called every REPORT_EVERY rows with their count.
    """

    def __init__(
        self,
        spool: RowSpool,
        refuse: Callable[[int, RefusedRow], object],
        max_refused: int,
        on_row: Callable[[int], object],
    ) -> None:
        # Rows that got a key of their own may share it with others.
        while self._decide(spool, max_refused, on_row):
            pass
        for number, refusal in sorted(self._refused.items()):
            refuse(number, refusal)
        rows, firsts = np.array(self._rows), np.array(self._firsts)
        by_first = np.lexsort((rows, firsts))
        self.rows: np.ndarray = rows[by_first]
        """Rows that continue a clip."""
        self._sorted_firsts = firsts[by_first]
        self.is_clip = np.ones(len(spool), dtype=bool)
        """False for rows that continue a clip or are refused."""
        self.is_clip[self.rows] = False
        self.is_clip[list(self._refused)] = False

    def of(self, first: int) -> np.ndarray:
        """Returns the rows that continue the clip of row `first`, in file order."""
        low, high = np.searchsorted(self._sorted_firsts, [first, first + 1])
        return self.rows[low:high]

    def _decide(self, spool: RowSpool, max_refused: int, on_row: Callable[[int], object]) -> bool:
        """Decides about all rows; returns True if some got a key of their own."""
        self._rows, self._firsts = array("q"), array("q")
        self._refused: dict[int, RefusedRow] = {}
        has_renamed = False
        for count, decision in enumerate(_decisions(spool), start=1):
            if decision.kind == "renamed":
                spool.rename(decision.row)
                has_renamed = True
            elif decision.refusal is not None:
                self._refused[decision.row] = decision.refusal
                if len(self._refused) > max_refused:
                    return False
            else:
                self._rows.append(decision.row)
                self._firsts.append(decision.first)
            if count % REPORT_EVERY == 0:
                on_row(count)  # tasks that wait must see that this one lives
        return has_renamed


def _decisions(spool: RowSpool) -> Iterator[Decision]:
    order, is_new = spool.sort_by_key()
    is_last = np.append(is_new[1:], True)[: len(is_new)]
    starts = np.flatnonzero(is_new & ~is_last)
    ends = np.flatnonzero(~is_new & is_last) + 1
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        rows = order[start:end]
        owner = spool.row(spool.first_own_key(rows))
        yield from decide_rows(_listed(rows), owner, spool.row)


def _listed(rows: np.ndarray) -> Iterator[int]:
    for start in range(0, len(rows), CHUNK):
        yield from rows[start : start + CHUNK].tolist()


def _sorted(high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts rows by two words, equal ones in file order.

    Returns:
        The rows in order, and for each of them whether its words differ from those before.
    """
    order = np.lexsort((low, high))
    is_new = np.ones(len(order), dtype=bool)
    for word in (high, low):
        values = word[order]
        differs = values[1:] != values[:-1]
        is_new[1:] = differs if word is high else is_new[1:] | differs
    return order, is_new


def _key_digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()
