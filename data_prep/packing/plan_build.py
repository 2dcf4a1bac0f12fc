"""Makes the plan of a packing from a stream of clips, in memory of a few numbers a clip.

1. Each row is checked and appended to a file, see `row_spool`. A row that is no clip is noted.
2. Rows of the same key are compared, see `same_key`.
3. The clips are ordered: by a seeded hash of their video, so that the cuts of one video are
   neighbours and the videos lie in random order; or as they came.
4. The rows are written in that order, and words are counted, shard after shard.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tvr.data_prep.annotations.clip_keys import KEY_PATTERN, key_rule
from tvr.data_prep.annotations.clip_lines import decode_captions, encode_clip
from tvr.data_prep.annotations.clip_source import ClipSource
from tvr.data_prep.annotations.row_spool import REPORT_EVERY, RepeatedKeys, RowSpool, RowWriter
from tvr.data_prep.annotations.same_key import merge_clips
from tvr.data_prep.budget import BadRows
from tvr.data_prep.packing.plan import (
    PackSettings,
    PlanHeader,
    encode_refused,
    plan_record,
    record_fingerprint,
)
from tvr.data_prep.packing.word_counts import WordCounter
from tvr.data_prep.packing.words import word_forms
from tvr.data_prep.records import VIDEO_ID_RULE, Clip, RefusedRow, is_video_id
from tvr.data_prep.video.frame_sampling import check_span

MIB = 1 << 20
# Rows of the same key that are refused beyond the limit, for the first ones of the file among them.
MAX_LISTED = 10_000
HALF_PAIR = re.compile(r"[\ud800-\udfff]")

OnPlan = Callable[[str, int], object]
"""Receives what planning does ("read", "compared", "ordered") and with how many clips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltPlan:
    """A plan in local files."""

    header: PlanHeader
    rows: Path
    index: Path
    refused: tuple[RefusedRow, ...] = ()
    """Rows of the annotations that are no clips, in file order."""


def build_plan(
    source: ClipSource,
    settings: PackSettings,
    folder: Path,
    on_plan: OnPlan = lambda step, done: None,
    *,
    max_bad: int = 0,
) -> BuiltPlan:
    """Checks and orders the clips of a source, and writes the plan's files into `folder`.

    Args:
        on_plan: Called every REPORT_EVERY clips; an exception of it ends planning.
        max_bad: Rows that may be no clips.

    Raises:
        TooManyBadSamples: more than `max_bad` rows are no clips.
        ValueError: a given clip's key or video_id is invalid, the layout cannot store a cut, or the
            source is malformed as a whole.
    """
    rows_path, index_path = folder / "rows.jsonl", folder / "index.bin"
    bad = BadRows(max_bad)
    with open(folder / "unordered", "w+b") as rows, open(folder / "numbers", "w+b") as numbers:
        writer = RowWriter(rows, numbers, settings.shuffle_seed or 0)
        in_memory = _spool(source, settings, writer, bad, on_plan)
        spool = RowSpool(rows, numbers)
        order, first_rows = _order(spool, settings, bad, on_plan)
        num_shards = len(first_rows) - 1
        with open(rows_path, "wb", buffering=MIB) as out:
            written = _write_rows(spool, order, first_rows, settings, out, on_plan)
            refused = encode_refused(bad.rows())
            out.write(refused)
            written.digest.update(refused)
    for name in ("unordered", "numbers"):
        (folder / name).unlink()
    counts = written.words.finish()
    index = np.concatenate(
        [first_rows.astype(np.uint64), written.offsets, written.crc32s, counts.table.ravel()]
    ).tobytes()
    index_path.write_bytes(index)
    record = plan_record(settings, len(order), written.digest.hexdigest())
    header = PlanHeader(
        fingerprint=record_fingerprint(record),
        record=record,
        num_clips=len(order),
        num_shards=num_shards,
        num_words=counts.table.shape[1],
        index_sha256=hashlib.sha256(index).hexdigest(),
        in_memory=in_memory,
        num_refused=len(bad.rows()),
        refused_bytes=len(refused),
        refused_crc32=zlib.crc32(refused),
    )
    return BuiltPlan(header=header, rows=rows_path, index=index_path, refused=bad.rows())


def check_packable(
    header: PlanHeader, url: str, processes: int, refused: Sequence[RefusedRow] = ()
) -> int:
    """Returns the number of processes; 0 for clips in the memory of this one.

    Raises ValueError if a plan has no clip, or processes would have to share a memory.
    """
    if not header.num_clips:
        found = f"no clip but {len(refused)} bad rows: {refused[0].detail}" if refused else ""
        raise ValueError(f"no usable clip to pack to {url}: {found or 'no clip at all'}")
    in_memory = url if "memory://" in url else header.in_memory
    if in_memory and processes > 1:
        raise ValueError(
            f"processes={processes} must be 1 (--processes 1) with {in_memory}: processes do not"
            " share memory:// files"
        )
    return 0 if in_memory else processes


def _spool(
    source: ClipSource, settings: PackSettings, writer: RowWriter, bad: BadRows, on_plan: OnPlan
) -> str:
    """Writes the rows and their numbers; returns a URL in memory, if a clip has one."""
    in_memory, place, count = "", 0, 0
    for count, row in enumerate(source.rows(), start=1):
        refusal = row if isinstance(row, RefusedRow) else _refusal(row.clip)
        if isinstance(row, RefusedRow) or refusal is not None:
            assert refusal is not None
            bad.add(place, refusal)
        else:
            _check(row.clip, settings)
            writer.append(row)
            place += 1
            if not in_memory and "memory://" in row.clip.video:
                in_memory = row.clip.video
        bad.check(count)
        if count % REPORT_EVERY == 0:
            on_plan("read", count)
    bad.check(count, is_end=True)
    return in_memory


def _refusal(clip: Clip) -> RefusedRow | None:
    """Refuses a clip with a caption that no file can store; rows were checked when read."""
    for caption in clip.captions:
        if not caption.isascii() and HALF_PAIR.search(caption):
            where = clip.origin or clip.video
            detail = f"{where}: a caption of clip {clip.key!r} has half of a UTF-16 pair"
            return RefusedRow(origin=where, detail=detail)
    return None


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


def _order(
    spool: RowSpool, settings: PackSettings, bad: BadRows, on_plan: OnPlan
) -> tuple[_Order, np.ndarray]:
    """Returns the rows of the clips in the data set's order, and the first clip of each shard."""
    limit = bad.max_bad + MAX_LISTED
    repeats = RepeatedKeys(spool, bad.add, limit, lambda count: on_plan("compared", count))
    bad.check(len(spool), is_end=True)
    is_clip = repeats.is_clip
    limit = settings.samples_per_shard
    if settings.shuffle_seed is None:
        rows = np.flatnonzero(is_clip)
        first_rows = np.append(np.arange(0, len(rows), limit), len(rows))
        return _Order(rows, repeats), first_rows
    rows, is_new = spool.sort_by_video()
    if not is_clip.all():
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
    repeats: RepeatedKeys

    def __len__(self) -> int:
        return len(self.rows)

    def lines(self, spool: RowSpool, start: int, end: int) -> Iterator[bytes]:
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
    digest: Any
    """sha256 of the rows so far."""


def _write_rows(
    spool: RowSpool,
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
        digest=digest,
    )
