"""Makes the plan of a packing from a stream of clips, in memory of a few numbers a clip.

1. Each row is checked and appended to a file; its key, its video and its place become numbers.
2. Rows of the same key are found by sorting these numbers.
3. The clips are ordered: by a seeded hash of their video, so that the cuts of one video are
   neighbours and the videos lie in random order; or as they came.
4. The rows are written in that order, and words are counted, shard after shard.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tvr.data_prep.annotations.clip_keys import KEY_PATTERN, key_rule
from tvr.data_prep.annotations.clip_source import ClipSource
from tvr.data_prep.annotations.read import merge_clips
from tvr.data_prep.packing.plan import (
    PackSettings,
    PlanHeader,
    decode_captions,
    decode_clip,
    encode_clip,
    plan_record,
    record_fingerprint,
)
from tvr.data_prep.packing.word_counts import WordCounter
from tvr.data_prep.packing.words import word_forms
from tvr.data_prep.records import VIDEO_ID_RULE, Clip, is_video_id
from tvr.data_prep.video.frame_sampling import check_span

# Of a row: two words of the key's hash, two words of the video's seeded hash, place in the file of
# rows, and whether the row may continue an earlier one of the same key.
NUMBERS_PER_ROW = 6
REPORT_EVERY = 10_000
MIB = 1 << 20

OnPlan = Callable[[str, int], object]
"""Receives what planning does ("read", "compared", "ordered") and with how many clips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltPlan:
    """A plan in local files."""

    header: PlanHeader
    rows: Path
    index: Path


def build_plan(
    source: ClipSource,
    settings: PackSettings,
    folder: Path,
    on_plan: OnPlan = lambda step, done: None,
) -> BuiltPlan:
    """Checks and orders the clips of a source, and writes the plan's files into `folder`.

    Args:
        on_plan: Called every REPORT_EVERY clips; an exception of it ends planning.

    Raises:
        ValueError: a key is invalid or not unique, a video_id is invalid, the layout cannot store
            a cut, or the source is malformed.
    """
    rows_path, index_path = folder / "rows.jsonl", folder / "index.bin"
    with open(folder / "unordered", "w+b") as rows, open(folder / "numbers", "w+b") as numbers:
        in_memory = _spool(source, settings, rows, numbers, on_plan)
        spool = _Spool(rows, numbers)
        order, first_rows = _order(spool, settings, on_plan)
        num_shards = len(first_rows) - 1
        with open(rows_path, "wb", buffering=MIB) as out:
            written = _write_rows(spool, order, first_rows, settings, out, on_plan)
    for name in ("unordered", "numbers"):
        (folder / name).unlink()
    counts = written.words.finish()
    index = np.concatenate(
        [first_rows.astype(np.uint64), written.offsets, written.crc32s, counts.table.ravel()]
    ).tobytes()
    index_path.write_bytes(index)
    record = plan_record(settings, len(order), written.sha256)
    header = PlanHeader(
        fingerprint=record_fingerprint(record),
        record=record,
        num_clips=len(order),
        num_shards=num_shards,
        num_words=counts.table.shape[1],
        index_sha256=hashlib.sha256(index).hexdigest(),
        in_memory=in_memory,
    )
    return BuiltPlan(header=header, rows=rows_path, index=index_path)


def _spool(
    source: ClipSource, settings: PackSettings, rows: BinaryIO, numbers: BinaryIO, on_plan: OnPlan
) -> str:
    """Writes the rows and their numbers; returns a URL in memory, if a clip has one."""
    in_memory, place = "", 0
    seed = (settings.shuffle_seed or 0).to_bytes(8, "little")
    for count, (clip, may_continue) in enumerate(source.rows(), start=1):
        _check(clip, settings)
        line = encode_clip(clip)
        key = hashlib.blake2b(clip.key.encode(), digest_size=16).digest()
        name = clip.video.encode("utf-8", "surrogatepass")
        video = hashlib.blake2b(name, digest_size=16, key=seed).digest()
        numbers.write(key + video + struct.pack("<QQ", place, may_continue))
        rows.write(line)
        place += len(line)
        if not in_memory and "memory://" in clip.video:
            in_memory = clip.video
        if count % REPORT_EVERY == 0:
            on_plan("read", count)
    rows.flush()
    numbers.flush()
    return in_memory


def _check(clip: Clip, settings: PackSettings) -> None:
    where = clip.origin or clip.video
    if not KEY_PATTERN.fullmatch(clip.key):
        raise ValueError(f"{where}: {key_rule(clip.key)}")
    if not is_video_id(clip.video_id):
        raise ValueError(f"{where}: video_id={clip.video_id!r} must be {VIDEO_ID_RULE}")
    check_span(clip.span)
    if clip.span is not None and settings.layout == "video" and not settings.reencode:
        raise ValueError(
            f"{where}: clip {clip.key!r} is cut out of its video; layout=video needs"
            " reencode=True (--reencode) for that, because a copy is the whole file"
        )


class _Spool:
    """The rows as they came, read by their number."""

    def __init__(self, rows: BinaryIO, numbers: BinaryIO) -> None:
        self._file = rows.fileno()
        size = os.fstat(numbers.fileno()).st_size
        self._numbers = (
            np.memmap(numbers, np.uint64, "r").reshape(-1, NUMBERS_PER_ROW)  # type: ignore[call-overload]
            if size
            else np.empty((0, NUMBERS_PER_ROW), dtype=np.uint64)
        )
        end = np.array([os.fstat(self._file).st_size], dtype=np.uint64)
        self._places = np.concatenate([self._numbers[:, 4], end])

    def __len__(self) -> int:
        return len(self._numbers)

    def sort_by_key(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns `_sorted` of the keys' hashes."""
        return _sorted(self._numbers[:, 0], self._numbers[:, 1])

    def sort_by_video(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns `_sorted` of the videos' seeded hashes."""
        return _sorted(self._numbers[:, 2], self._numbers[:, 3])

    def may_continue(self, row: int) -> bool:
        return bool(self._numbers[row, 5])

    def line(self, row: int) -> bytes:
        start = int(self._places[row])
        return os.pread(self._file, int(self._places[row + 1]) - start, start)

    def clip(self, row: int) -> Clip:
        return decode_clip(self.line(row))


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


class _Repeats:
    """Rows that continue the clip of an earlier row."""

    def __init__(self, spool: _Spool, on_plan: OnPlan) -> None:
        order, is_new = spool.sort_by_key()
        repeats = np.flatnonzero(~is_new)
        rows = order[repeats]
        if len(rows):
            news = np.flatnonzero(is_new)
            firsts = order[news[np.searchsorted(news, repeats) - 1]]
            by_first = np.lexsort((rows, firsts))
            rows, firsts = rows[by_first], firsts[by_first]
        else:
            firsts = rows
        self.rows, self._firsts = rows, firsts
        self._check(spool, on_plan)

    def of(self, first: int) -> np.ndarray:
        """Returns the rows that continue the clip of row `first`, in file order."""
        low, high = np.searchsorted(self._firsts, [first, first + 1])
        return self.rows[low:high]

    def _check(self, spool: _Spool, on_plan: OnPlan) -> None:
        """Raises ValueError for the first row in the file that is no part of the earlier clip."""
        for count, place in enumerate(np.argsort(self.rows).tolist(), 1):
            if count % REPORT_EVERY == 0:
                on_plan("compared", count)  # tasks that wait must see that this one lives
            first, row = int(self._firsts[place]), int(self.rows[place])
            may_continue = spool.may_continue(first) and spool.may_continue(row)
            merge_clips(spool.clip(first), spool.clip(row), may_continue=may_continue)


def _order(spool: _Spool, settings: PackSettings, on_plan: OnPlan) -> tuple[_Order, np.ndarray]:
    """Returns the rows of the clips in the data set's order, and the first clip of each shard."""
    repeats = _Repeats(spool, on_plan)
    is_clip = np.ones(len(spool), dtype=bool)
    is_clip[repeats.rows] = False
    limit = settings.samples_per_shard
    if settings.shuffle_seed is None:
        rows = np.flatnonzero(is_clip)
        first_rows = np.append(np.arange(0, len(rows), limit), len(rows))
        return _Order(rows, repeats), first_rows
    rows, is_new = spool.sort_by_video()
    if len(repeats.rows):
        number = np.cumsum(is_new)[is_clip[rows]]
        rows = rows[is_clip[rows]]
        is_new = np.concatenate([[True], number[1:] != number[:-1]])[: len(rows)]
    videos = np.append(np.flatnonzero(is_new), len(rows))
    return _Order(rows, repeats), _shard_starts(videos, len(rows), limit)


def _shard_starts(videos: np.ndarray, num_clips: int, limit: int) -> np.ndarray:
    """Fills shards with whole videos; a video with more clips than a shard is split.

    Args:
        videos: First clip of each video, ascending, then `num_clips`.
    """
    starts = [0]
    while starts[-1] < num_clips:
        most = starts[-1] + limit
        last = int(videos[np.searchsorted(videos, most, side="right") - 1])
        starts.append(min(last if last > starts[-1] else most, num_clips))
    return np.array(starts)


@dataclass(frozen=True, slots=True)
class _Order:
    """Rows of the clips in the data set's order."""

    rows: np.ndarray
    repeats: _Repeats

    def __len__(self) -> int:
        return len(self.rows)

    def lines(self, spool: _Spool, start: int, end: int) -> Iterator[bytes]:
        """Yields the lines of the clips [start, end)."""
        for row in self.rows[start:end].tolist():
            if not len(self.repeats.rows):
                yield spool.line(row)
                continue
            clip = spool.clip(row)
            for repeat in self.repeats.of(row).tolist():
                clip = merge_clips(clip, spool.clip(repeat), may_continue=True)
            yield encode_clip(clip)


@dataclass(slots=True)
class _Written:
    """What the rows are known by."""

    offsets: np.ndarray
    """(S + 1,) first byte of each shard's clips, and the size of the file."""
    crc32s: np.ndarray
    """(S,)"""
    words: WordCounter
    sha256: str


def _write_rows(
    spool: _Spool,
    order: _Order,
    first_rows: np.ndarray,
    settings: PackSettings,
    out: BinaryIO,
    on_plan: OnPlan,
) -> _Written:
    offsets, crc32s, words, digest = [0], [], WordCounter(), hashlib.sha256()
    count = 0
    for start, end in zip(first_rows[:-1].tolist(), first_rows[1:].tolist(), strict=True):
        size, crc32 = 0, 0
        for line in order.lines(spool, start, end):
            out.write(line)
            digest.update(line)
            size, crc32 = size + len(line), zlib.crc32(line, crc32)
            if settings.words:
                words.add(word_forms(decode_captions(line)))
            count += 1
            if count % REPORT_EVERY == 0:
                on_plan("ordered", count)
        offsets.append(offsets[-1] + size)
        crc32s.append(crc32)
    return _Written(
        offsets=np.array(offsets, dtype=np.uint64),
        crc32s=np.array(crc32s, dtype=np.uint64),
        words=words,
        sha256=digest.hexdigest(),
    )
