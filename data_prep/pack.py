"""Clips -> WebDataset tar shards with a manifest. The same clips and settings give the same
bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_args

import fsspec
from fsspec.core import url_to_fs

from tvr.data_prep.annotations import KEY_PATTERN, key_rule
from tvr.data_prep.budget import Budget
from tvr.data_prep.decode import VideoInfo, check_frames, describe_video, sample_frames
from tvr.data_prep.images import encode_jpeg, resize_short_side
from tvr.data_prep.manifest import (
    BAD_NAME,
    MANIFEST_NAME,
    SAMPLES_NAME,
    Layout,
    Manifest,
    join,
    write_manifest,
)
from tvr.data_prep.records import BadSample, Clip
from tvr.data_prep.reencode import reencode_video
from tvr.data_prep.shards import (
    PARTIAL,
    SHARD_PATTERN,
    ShardWriter,
    content_hash,
    remove_files,
)


def pack_shards(
    clips: Iterable[Clip],
    url: str,
    *,
    layout: Layout,
    num_frames: int = 12,
    short_side: int | None = None,
    jpeg_quality: int = 90,
    samples_per_shard: int = 1000,
    max_bad: int = 0,
    reencode: bool = False,
    keyframe_interval: int = 16,
    overwrite: bool = False,
) -> Manifest:
    """Writes `shard-NNNNNN.tar`, `samples.npz`, `bad.jsonl` and, last, `manifest.json` to a folder
    or fsspec URL.

    frames layout: `num_frames` JPEGs a clip. video layout: the source MP4's bytes after decoding
    them once, or with `reencode` an H.264 copy with a keyframe every `keyframe_interval` frames.
    `short_side` in pixels. Shards carry temporary names until all are complete; a data set being
    overwritten stays until then.

    Raises:
        TooManyBadSamples: more than `max_bad` clips were refused; nothing is published.
        FileExistsError: a complete data set is there and `overwrite` is false.
        ValueError: a setting out of range, a bad or duplicate key, or no usable clip.
    """
    settings = _Settings(
        layout=layout,
        num_frames=num_frames,
        short_side=short_side,
        jpeg_quality=jpeg_quality,
        samples_per_shard=samples_per_shard,
        reencode=reencode,
        keyframe_interval=keyframe_interval,
    )
    fs, root = url_to_fs(url)
    if not overwrite and fs.exists(join(root, MANIFEST_NAME)):
        raise FileExistsError(
            f"{url} holds a complete data set; pack elsewhere or allow it with --overwrite"
        )
    fs.makedirs(root, exist_ok=True)
    writer = ShardWriter(fs, root, settings.samples_per_shard)
    draft = _Draft(settings, writer, Budget(max_bad, f"while packing {url}"))
    try:
        remove_files(fs, root, lambda name: name.endswith(PARTIAL))  # of a packing that was killed
        for clip in clips:
            draft.add(clip)
        writer.end_shard()
        if not writer.rows:
            refused = dict(draft.budget.by_reason) or "none"
            raise ValueError(f"no usable clip to pack to {url}; refused: {refused}")
        return _publish(fs, root, url, draft)
    finally:
        writer.close()
        remove_files(fs, root, lambda name: name.endswith(PARTIAL))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    layout: Layout
    num_frames: int
    short_side: int | None
    jpeg_quality: int
    samples_per_shard: int
    reencode: bool
    keyframe_interval: int

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


@dataclass(slots=True)
class _Draft:
    """A data set being written."""

    settings: _Settings
    writer: ShardWriter
    budget: Budget
    bad: list[dict[str, str]] = field(default_factory=list)
    num_empty_captions: int = 0
    origins: dict[str, str] = field(default_factory=dict)

    def add(self, clip: Clip) -> None:
        """Packs one clip, or counts it as bad."""
        self._check_key(clip)
        if clip.span is not None:
            raise ValueError(f"{clip.origin or clip.key}: start_s and end_s are not cut by packing")
        captions = tuple(text for text in (" ".join(c.split()) for c in clip.captions) if text)
        try:
            if not captions:
                found = f"{len(clip.captions)} captions, none with a character"
                raise BadSample(clip.key, "no_caption", found)
            source = _read_source(clip)
            members = _members(clip, source, captions, self.settings)
        except BadSample as error:
            detail = f"{error.detail} [{clip.video}{' of ' + clip.origin if clip.origin else ''}]"
            self.bad.append({"key": clip.key, "reason": error.reason, "detail": detail})
            self.budget.spend(clip.key, error.reason, detail)
            return
        self.num_empty_captions += len(clip.captions) - len(captions)
        self.writer.append(
            clip.key,
            clip.video_id,
            members,
            num_captions=len(captions),
            content=content_hash(source, clip.span),
        )

    def _check_key(self, clip: Clip) -> None:
        where = clip.origin or clip.video
        if not KEY_PATTERN.fullmatch(clip.key):
            raise ValueError(f"{where}: {key_rule(clip.key)}")
        if clip.key in self.origins:
            raise ValueError(
                f"{where}: duplicate key {clip.key!r}, first at {self.origins[clip.key]}"
            )
        self.origins[clip.key] = where

    def manifest(self) -> Manifest:
        """The index of what was written."""
        samples = self.writer.columns()
        return Manifest(
            layout=self.settings.layout,
            num_frames=self.settings.num_frames if self.settings.layout == "frames" else 0,
            short_side=self.settings.short_side,
            num_captions=int(samples.num_captions.sum()),
            num_empty_captions=self.num_empty_captions,
            bad=dict(sorted(self.budget.by_reason.items())),
            shards=tuple(self.writer.shards),
            samples=samples,
        )


def _publish(fs: Any, root: str, url: str, draft: _Draft) -> Manifest:
    """Gives the shards their names and writes the index, `manifest.json` last."""
    # The old manifest goes first: from here until the new one is there, no data set is claimed.
    remove_files(fs, root, lambda name: name == MANIFEST_NAME)
    stale = (SAMPLES_NAME, BAD_NAME)
    remove_files(fs, root, lambda name: name in stale or bool(SHARD_PATTERN.fullmatch(name)))
    draft.writer.publish()
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in draft.bad)
    fs.pipe_file(join(root, BAD_NAME), lines.encode())
    manifest = draft.manifest()
    write_manifest(url, manifest)
    return manifest


def _members(
    clip: Clip, source: bytes, captions: tuple[str, ...], settings: _Settings
) -> dict[str, bytes]:
    info = describe_video(source, key=clip.key)
    if settings.layout == "frames":
        frames, times_s = sample_frames(source, settings.num_frames, key=clip.key)
        if settings.short_side is not None:
            frames = resize_short_side(frames, settings.short_side)
        digits = max(2, len(str(settings.num_frames - 1)))
        members = {
            f"{index:0{digits}d}.jpg": encode_jpeg(frame, settings.jpeg_quality)
            for index, frame in enumerate(frames)
        }
    elif settings.reencode:
        members = {
            "mp4": reencode_video(
                source,
                short_side=settings.short_side,
                keyframe_interval=settings.keyframe_interval,
                key=clip.key,
            )
        }
        times_s = ()
    else:
        if "mp4" not in info.container.split(","):
            raise BadSample(
                clip.key, "not_mp4", f"container {info.container}; --reencode turns it into MP4"
            )
        check_frames(source, key=clip.key)
        members, times_s = {"mp4": source}, ()
    text = json.dumps(
        _meta(clip, captions, info, times_s),
        ensure_ascii=False,
        sort_keys=True,
        separators=(",", ":"),
    )
    return {"json": text.encode(), **members}


def _meta(
    clip: Clip, captions: tuple[str, ...], info: VideoInfo, times_s: tuple[float, ...]
) -> dict[str, Any]:
    """The sample's JSON member."""
    return {
        "captions": captions,
        "video_id": clip.video_id,
        "frame_times_s": times_s,  # of the stored frames; empty where the video itself is stored
        "source_size": [info.width, info.height],
        "fps": round(info.frame_rate_hz, 6),
        "duration_s": info.duration_s,
    }


def _read_source(clip: Clip) -> bytes:
    try:
        with fsspec.open(clip.video, "rb") as file:
            return file.read()  # type: ignore[union-attr]
    except OSError as error:
        raise BadSample(clip.key, "missing_file", f"{type(error).__name__}: {error}") from error
