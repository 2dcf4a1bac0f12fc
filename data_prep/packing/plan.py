"""The plan of a packing: the clips of each shard, and a fingerprint of everything that determines
the data set's bytes.

The plan is a pure function of the clip list and the settings. It depends neither on processes and
tasks, nor on restarts, nor on clips that turn out to be bad. Any process can therefore pack any
shard, with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, get_args

from tvr.data_prep.annotations.clip_keys import KEY_PATTERN, key_rule
from tvr.data_prep.dataset.manifest import FORMAT_VERSION, Layout
from tvr.data_prep.records import VIDEO_ID_RULE, Clip, is_video_id
from tvr.data_prep.video.frame_sampling import check_span

# Packages whose versions determine the stored pictures, videos and words.
WRITER_PACKAGES = ("av", "pillow", "HanTa")


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

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout={self.layout!r} must be one of {', '.join(get_args(Layout))}")
        for name, low, high in (
            ("num_frames", 1, 1000),
            ("short_side", 2, 4096),
            ("jpeg_quality", 1, 100),
            ("samples_per_shard", 1, 10**6),
            ("keyframe_interval", 1, 1000),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}={value} must be from {low} to {high}")
        if self.layout == "frames" and self.reencode:
            raise ValueError("reencode=True is for layout=video; the frames layout stores JPEGs")
        if self.layout == "video" and self.short_side is not None and not self.reencode:
            raise ValueError(
                f"short_side={self.short_side} needs reencode=True in layout=video: a copy keeps"
                " its size"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """Clips and settings of a packing."""

    clips: tuple[Clip, ...]
    settings: PackSettings
    record: dict[str, Any]
    """Everything that determines the data set's bytes except the source videos; JSON values."""
    fingerprint: str
    """sha256 of `record`."""

    @property
    def num_shards(self) -> int:
        return -(-len(self.clips) // self.settings.samples_per_shard)

    def shard_clips(self, number: int) -> Sequence[Clip]:
        """Returns the clips of a shard: `samples_per_shard`, fewer in the last shard."""
        first = number * self.settings.samples_per_shard
        return self.clips[first : first + self.settings.samples_per_shard]

    def task_shards(self, task: int, num_tasks: int) -> range:
        """Returns the numbers of the shards that a task packs."""
        return range(task, self.num_shards, num_tasks)


def make_plan(clips: Iterable[Clip], settings: PackSettings) -> PackPlan:
    """Assigns `samples_per_shard` clips to each shard, in order.

    Raises:
        ValueError: a key is invalid or not unique, a video_id is invalid, or the layout cannot
            store a cut.
    """
    clips = tuple(clips)
    digest = hashlib.sha256()
    origins: dict[str, str] = {}
    for clip in clips:
        where = clip.origin or clip.video
        if not KEY_PATTERN.fullmatch(clip.key):
            raise ValueError(f"{where}: {key_rule(clip.key)}")
        if not is_video_id(clip.video_id):
            raise ValueError(f"{where}: video_id={clip.video_id!r} must be {VIDEO_ID_RULE}")
        if clip.key in origins:
            raise ValueError(f"{where}: duplicate key {clip.key!r}, first at {origins[clip.key]}")
        check_span(clip.span)
        if clip.span is not None and settings.layout == "video" and not settings.reencode:
            raise ValueError(
                f"{where}: clip {clip.key!r} is cut out of its video; layout=video needs"
                " reencode=True (--reencode) for that, because a copy is the whole file"
            )
        origins[clip.key] = where
        digest.update(json.dumps(_clip_fields(clip)).encode() + b"\n")
    record = {
        "format_version": FORMAT_VERSION,
        "num_clips": len(clips),
        "clips": digest.hexdigest(),
        **asdict(settings),
        **{name: version(name) for name in WRITER_PACKAGES},
    }
    text = json.dumps(record, sort_keys=True)
    return PackPlan(
        clips=clips,
        settings=settings,
        record=record,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
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


def _clip_fields(clip: Clip) -> tuple[Any, ...]:
    """Returns the fields that determine a sample, or its line in bad.jsonl."""
    return (
        *(clip.key, clip.video, clip.captions, clip.video_id, clip.origin),
        *(clip.start_s, clip.end_s),
    )
