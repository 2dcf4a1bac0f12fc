"""What a packing will write, before anything is read: which clip goes to which shard, and a
fingerprint of all that its bytes depend on.

Pure functions of the clip list and the settings. Processes, tasks, restarts and clips that turn out
to be bad change nothing here, so that anyone can make any shard, with the same bytes.
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
from tvr.data_prep.records import Clip
from tvr.data_prep.video.frame_sampling import check_span

# Packages whose versions pictures, videos and words are a function of.
WRITERS = ("av", "pillow", "HanTa")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSettings:
    """What every sample of a data set is made with; see `pack_shards`."""

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
class Plan:
    """All shards of a packing."""

    clips: tuple[Clip, ...]
    settings: PackSettings
    record: dict[str, Any]
    """All that the data set's bytes are a function of, less the bytes of the sources; JSON."""
    fingerprint: str
    """Of `record`."""

    @property
    def num_shards(self) -> int:
        return -(-len(self.clips) // self.settings.samples_per_shard)

    def shard_clips(self, number: int) -> Sequence[Clip]:
        """The clips of a shard, less than `samples_per_shard` in the last one only."""
        first = number * self.settings.samples_per_shard
        return self.clips[first : first + self.settings.samples_per_shard]

    def share(self, task: int, num_tasks: int) -> range:
        """The shards that one of several tasks makes."""
        return range(task, self.num_shards, num_tasks)


def make_plan(clips: Iterable[Clip], settings: PackSettings) -> Plan:
    """Clips `samples_per_shard` to a shard in their order.

    Raises:
        ValueError: a bad or duplicate key, or a cut that the layout cannot make.
    """
    clips = tuple(clips)
    digest = hashlib.sha256()
    origins: dict[str, str] = {}
    for clip in clips:
        where = clip.origin or clip.video
        if not KEY_PATTERN.fullmatch(clip.key):
            raise ValueError(f"{where}: {key_rule(clip.key)}")
        if clip.key in origins:
            raise ValueError(f"{where}: duplicate key {clip.key!r}, first at {origins[clip.key]}")
        check_span(clip.span)
        if clip.span is not None and settings.layout == "video" and not settings.reencode:
            raise ValueError(
                f"{where}: clip {clip.key!r} is cut out of its video, which in layout=video needs"
                " reencode=True (--reencode): a copy is the whole file"
            )
        origins[clip.key] = where
        digest.update(json.dumps(_fields(clip)).encode() + b"\n")
    record = {
        "format_version": FORMAT_VERSION,
        "num_clips": len(clips),
        "clips": digest.hexdigest(),
        **asdict(settings),
        **{name: version(name) for name in WRITERS},
    }
    text = json.dumps(record, sort_keys=True)
    return Plan(
        clips=clips,
        settings=settings,
        record=record,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
    )


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What the records of two plans differ in."""
    told = []
    for name in {**before, **now}:
        if name == "clips" and before.get(name) != now.get(name):
            told.append("the clips' keys, paths, captions, cuts, origins or order differ")
        elif before.get(name) != now.get(name):
            told.append(f"{name} was {before.get(name)!r}, is {now.get(name)!r}")
    return "; ".join(told)


def _fields(clip: Clip) -> tuple[Any, ...]:
    """All that a sample, or its line in the list of bad ones, is made from."""
    return (
        *(clip.key, clip.video, clip.captions, clip.video_id, clip.origin),
        *(clip.start_s, clip.end_s),
    )
