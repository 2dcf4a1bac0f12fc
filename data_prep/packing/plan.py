"""The plan of a packing: the clips of each shard, and a fingerprint of everything that determines
the data set's bytes.

The plan is a pure function of the clips and the settings. It depends neither on processes and
tasks, nor on restarts, nor on clips that turn out to be bad. Any process can therefore pack any
shard, with the same bytes.

A plan has two files, which `plan_build` writes once and all tasks read:

- the rows, one clip a line of JSON, in the order of the shards, and then the rows of the
  annotations that were refused;
- the index: where each shard begins in the rows, and in how many clips each word occurs.

A task reads the index and the lines of its own shards.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tvr.data_prep.annotations.clip_lines import decode_clip
from tvr.data_prep.dataset.manifest import FORMAT_VERSION, Layout
from tvr.data_prep.packing.word_counts import WordCounts
from tvr.data_prep.records import Clip, RefusedRow, ShardCorrupt
from tvr.data_prep.video.frame_sampling import FrameSpacing, check_spacing

# Packages whose versions determine the stored pictures, videos and words.
WRITER_PACKAGES = ("av", "pillow", "HanTa")
MAX_SHARD_BYTES = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSettings:
    """Settings of all samples of a data set; see `pack_shards`."""

    layout: Layout
    num_frames: int
    short_side: int | None
    jpeg_quality: int
    samples_per_shard: int
    reencode: bool
    keyframe_interval: int
    words: bool
    frame_spacing: FrameSpacing = "time"
    shard_bytes: int = 1 << 30
    """A shard is split into files of at most this size; a larger sample has its own file."""
    shuffle_seed: int | None = None
    """Seed of the order of clips, in which the cuts of one video are neighbours; None keeps the
    order of the annotations."""

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout={self.layout!r} must be one of {', '.join(get_args(Layout))}")
        for name, low, high in (
            ("num_frames", 1, 1000),
            ("short_side", 2, 4096),
            ("jpeg_quality", 1, 100),
            ("samples_per_shard", 1, 10**6),
            ("keyframe_interval", 1, 1000),
            ("shard_bytes", 1, MAX_SHARD_BYTES),
            ("shuffle_seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}={value} must be from {low} to {high}")
        check_spacing(self.frame_spacing, "frame_spacing")
        if self.layout == "video" and self.frame_spacing != "time":
            raise ValueError(
                f"frame_spacing={self.frame_spacing} is for layout=frames; the frames of"
                " layout=video are chosen when it is read (data.frame_spacing)"
            )
        if self.layout == "frames" and self.reencode:
            raise ValueError("reencode=True is for layout=video; the frames layout stores JPEGs")
        if self.layout == "video" and self.short_side is not None and not self.reencode:
            raise ValueError(
                f"short_side={self.short_side} needs reencode=True in layout=video: a copy keeps"
                " its size"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanHeader:
    """What identifies a plan, and the layout of its index; JSON values."""

    fingerprint: str
    """sha256 of `record`."""
    record: dict[str, Any]
    """Everything that determines the data set's bytes except the source videos."""
    num_clips: int
    num_shards: int
    num_words: int
    """Forms in the index; 0 without words."""
    index_sha256: str
    in_memory: str
    """A clip's URL in the memory of one process; empty if there is none."""
    num_refused: int = 0
    """Rows of the annotations that are no clips."""
    refused_bytes: int = 0
    """Size of their lines, at the end of the rows."""
    refused_crc32: int = 0

    @property
    def rows_name(self) -> str:
        """File name of the rows. Equal names have equal contents."""
        return f"clips-{self.fingerprint[:16]}.jsonl"

    @property
    def index_name(self) -> str:
        """File name of the index. Equal names have equal contents."""
        return f"clips-{self.fingerprint[:16]}.bin"


class PackPlan:
    """The clips of each shard, read from the plan's files.

    Args:
        index: Content of the index.
        read_rows: Returns the bytes [start, end) of the rows.
        folder: Local folder of this process, in which the counts of words are kept as a file, so
            that packing processes map one copy.

    Raises:
        ShardCorrupt: the index is damaged.
    """

    def __init__(
        self,
        header: PlanHeader,
        settings: PackSettings,
        index: bytes,
        read_rows: Callable[[int, int], bytes],
        folder: Path,
    ) -> None:
        if hashlib.sha256(index).hexdigest() != header.index_sha256:
            raise ShardCorrupt(f"{header.index_name}: sha256 differs from the plan's")
        self.header = header
        self.settings = settings
        self._read_rows = read_rows
        numbers, shards = np.frombuffer(index, np.uint64), header.num_shards
        # Copies: the slices of `numbers` would keep the words in memory.
        self._first_rows = numbers[: shards + 1].copy()
        self._offsets = numbers[shards + 1 : 2 * shards + 2].copy()
        self._crc32s = numbers[2 * shards + 2 : 3 * shards + 2].copy()
        self._words_file = folder / "words.bin"
        WordCounts(header.num_clips, numbers[3 * shards + 2 :]).write(self._words_file)

    @property
    def num_shards(self) -> int:
        return self.header.num_shards

    @property
    def fingerprint(self) -> str:
        return self.header.fingerprint

    def shard_size(self, number: int) -> int:
        """Returns the number of clips of a shard."""
        return int(self._first_rows[number + 1] - self._first_rows[number])

    def shard_clips(self, number: int) -> list[Clip]:
        """Reads the clips of a shard.

        Raises:
            ShardCorrupt: the rows are damaged.
        """
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        content = self._read_checked(start, end, int(self._crc32s[number]))
        return [decode_clip(line) for line in content.splitlines()]

    def refused_rows(self) -> list[RefusedRow]:
        """Reads the rows of the annotations that are no clips, in file order. Raises as above."""
        header, start = self.header, int(self._offsets[-1])
        if not header.num_refused:
            return []
        content = self._read_checked(start, start + header.refused_bytes, header.refused_crc32)
        rows = map(json.loads, content.splitlines())
        return [RefusedRow(origin=origin, detail=detail) for origin, detail in rows]

    def _read_checked(self, start: int, end: int, crc32: int) -> bytes:
        content = self._read_rows(start, end)
        if zlib.crc32(content) != crc32:
            raise ShardCorrupt(
                f"{self.header.rows_name}: bytes {start} to {end} are damaged; remove the folder"
                " .packing of the output and repeat the command"
            )
        return content

    def word_counts(self) -> WordCounts:
        """Returns in how many clips of the data set each word occurs."""
        return WordCounts.map_file(self.header.num_clips, self._words_file)

    def task_shards(self, task: int, num_tasks: int) -> range:
        """Returns the numbers of the shards that a task packs."""
        return range(task, self.num_shards, num_tasks)


def settings_record(settings: PackSettings) -> dict[str, Any]:
    """Returns the settings and versions that determine the data set's bytes; JSON values."""
    return {
        "format_version": FORMAT_VERSION,
        **asdict(settings),
        **{name: version(name) for name in WRITER_PACKAGES},
    }


def plan_record(settings: PackSettings, num_clips: int, clips_sha256: str) -> dict[str, Any]:
    """Returns the record of a plan, see `PlanHeader`."""
    return {"num_clips": num_clips, "clips": clips_sha256, **settings_record(settings)}


def record_fingerprint(record: dict[str, Any]) -> str:
    """Returns the fingerprint of a plan's record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def encode_refused(rows: Iterable[RefusedRow]) -> bytes:
    """Returns the lines of refused rows, which follow those of the clips."""
    lines = (json.dumps([row.origin, row.detail]) + "\n" for row in rows)
    return "".join(lines).encode()


def is_plan_of(stored: dict[str, Any], source: dict[str, Any], settings: PackSettings) -> bool:
    """True if a stored plan is of a source, see `ClipSource.identity`, and of these settings."""
    planned = stored["plan"]
    return stored.get("source") == source and all(
        name in planned and planned[name] == value
        for name, value in settings_record(settings).items()
    )


def plan_differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Describes the differences between the records of two plans."""
    differences = []
    for name in {**before, **now}:
        if name == "clips" and before.get(name) != now.get(name):
            differences.append("the clips' keys, paths, captions, cuts, origins or order differ")
        elif before.get(name) != now.get(name):
            differences.append(f"{name} was {before.get(name)!r}, is {now.get(name)!r}")
    return "; ".join(differences)
