"""Converts one clip to the bytes that its shard stores, or to the reason for refusing it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvr.data_prep.annotations.clip_keys import source_of
from tvr.data_prep.dataset.shard_writer import ContentHash, TarSample, tar_bytes
from tvr.data_prep.limited_process import Alive
from tvr.data_prep.packing.plan import PackSettings
from tvr.data_prep.packing.words import WordTagger, clean_captions
from tvr.data_prep.records import BadSample, Caption, Clip
from tvr.data_prep.storage.source_file import (
    ChangedFileError,
    NotAFileError,
    SourceFile,
    read_source,
)
from tvr.data_prep.storage.storage_errors import StorageUnavailable, is_passing_error
from tvr.data_prep.video.decode import VideoInfo, check_frames, describe_video, visit_frames
from tvr.data_prep.video.frame_index import Source, SourceIndices
from tvr.data_prep.video.images import encode_jpeg, resize_short_side
from tvr.data_prep.video.reencode import reencode_video
from tvr.data_prep.video.stored_index import index_member
from tvr.data_prep.video.truncation import check_whole

OUT_OF_MEMORY = "out_of_memory"
# A source with such an error cannot be opened; any other refusal of the storage is a read error.
MISSING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedClip:
    """A clip that is not packed; one line of bad.jsonl."""

    key: str
    reason: str
    """One of BAD_SAMPLE_REASONS."""
    detail: str


class LastSource:
    """The source that a process read last, which the next clip may be cut from, too."""

    def __init__(self) -> None:
        self._url: str | None = None
        self._source: _Source | _Refusal | None = None

    def read(self, clip: Clip, alive: Alive = lambda num_bytes: None) -> _Source:
        """Returns the source of a clip, read and listed once for clips in a row.

        Raises:
            BadSample: it cannot be read or is no video.
            StorageUnavailable: the storage fails for the moment.
        """
        if self._source is None or self._url != clip.video:
            self.close()  # frees the last one before the next
            try:
                self._source = _open_source(clip, alive)
            except BadSample as error:
                self._source = _Refusal(error.reason, error.detail)
            self._url = clip.video
        if isinstance(self._source, _Refusal):
            raise BadSample(clip.key, self._source.reason, self._source.detail)
        alive(self._source.file.num_bytes)
        return self._source

    @property
    def picture_bytes(self) -> int:
        """Bytes of a picture of the source; 0 if it is no video."""
        info = self._source.info if isinstance(self._source, _Source) else None
        return 0 if info is None else 3 * info.width * info.height

    def close(self) -> None:
        """Frees the source."""
        source, self._source = self._source, None
        if isinstance(source, _Source):
            source.file.close()


@dataclass(frozen=True, slots=True)
class _Source:
    file: SourceFile
    hash: ContentHash
    indices: SourceIndices
    info: VideoInfo

    @property
    def source(self) -> Source:
        return self.file.source


@dataclass(frozen=True, slots=True)
class _Refusal:
    reason: str
    detail: str


def pack_clip(
    clip: Clip,
    settings: PackSettings,
    tagger: WordTagger | None = None,
    last_source: LastSource | None = None,
    alive: Alive = lambda num_bytes: None,
) -> TarSample | RefusedClip:
    """Reads, checks and converts one clip. The same clip gives the same bytes.

    Args:
        last_source: Keeps the source for the next clip.
        alive: Called with each sign of progress.

    Raises:
        StorageUnavailable: the storage of the source fails for the moment. A refusal would leave
            the clip out of the data set for good.
    """
    captions = _captions(clip, tagger)
    try:
        if not captions:
            found = f"{len(clip.captions)} captions, none with a character"
            raise BadSample(clip.key, "no_caption", found)
        adjusted: set[str] = set()
        with nullcontext(last_source) if last_source else closing(LastSource()) as last:
            source = last.read(clip, alive)
            members = _members(clip, source, captions, settings, adjusted)
            _check_unchanged(clip, source.file)
    except BadSample as error:
        return refuse_clip(clip, error.reason, error.detail)
    except MemoryError as error:
        return refuse_clip(clip, OUT_OF_MEMORY, f"no memory left: {error}")
    return TarSample(
        key=clip.key,
        video_id=clip.video_id,
        stored=tar_bytes(clip.key, members),
        num_captions=len(captions),
        num_empty_captions=len(clip.captions) - len(captions),
        content=source.hash.of(clip.span),
        adjusted=tuple(sorted(adjusted)),
    )


def _captions(clip: Clip, tagger: WordTagger | None) -> tuple[Caption, ...]:
    texts = clean_captions(clip.captions)
    if tagger is not None:
        return tagger.tag(texts)
    return tuple(Caption(text=text) for text in texts)


def refusals_text(refused: Sequence[RefusedClip]) -> str:
    """Returns the number of refusals by reason, and the first three of them, for an error."""
    reasons = sorted(Counter(each.reason for each in refused).items())
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons)
    first = " | ".join(f"{each.key}: {each.reason}: {each.detail}" for each in refused[:3])
    return f"({counts}): {first}"


def refuse_clip(clip: Clip, reason: str, detail: str) -> RefusedClip:
    """Returns the refusal of a clip, with the clip's source in `detail`."""
    source = f"{clip.video} of {clip.origin}" if clip.origin else clip.video
    return RefusedClip(key=clip.key, reason=reason, detail=f"{detail} [{source}]")


def _members(
    clip: Clip,
    opened: _Source,
    captions: tuple[Caption, ...],
    settings: PackSettings,
    adjusted: set[str],
) -> dict[str, bytes]:
    """Returns the clip's members; adds to `adjusted` what its pictures needed."""
    source, indices, info = opened.source, opened.indices, opened.info
    times_s: tuple[float, ...] = ()
    if settings.layout == "frames":
        jpegs, times_s = _frames(clip, opened, settings, adjusted)
        digits = max(2, len(str(settings.num_frames - 1)))
        members = {f"{index:0{digits}d}.jpg": jpeg for index, jpeg in enumerate(jpegs)}
    elif settings.reencode:
        video = reencode_video(
            source,
            short_side=settings.short_side,
            keyframe_interval=settings.keyframe_interval,
            span=clip.span,
            key=clip.key,
            adjusted=adjusted,
            indices=indices,
        )
        members = {"mp4": video, **index_member(video, clip.key)}
    else:
        if "mp4" not in info.container.split(","):
            raise BadSample(
                clip.key, "not_mp4", f"container {info.container}; --reencode turns it into MP4"
            )
        decoded = check_frames(source, key=clip.key, adjusted=adjusted, indices=indices)
        content = opened.file.content()
        packets = indices.packets(clip.key)
        members = {"mp4": content, **index_member(content, clip.key, decoded, packets)}
    meta = _meta(clip, captions, info, times_s)
    if adjusted:
        meta["adjusted"] = sorted(adjusted)
    if (named := source_of(clip)) is not None:
        meta["source"] = named
    text = json.dumps(meta, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return {"json": text.encode(), **members}


def _meta(
    clip: Clip, captions: tuple[Caption, ...], info: VideoInfo, times_s: tuple[float, ...]
) -> dict[str, Any]:
    """Returns the fields of the sample's JSON member."""
    return {
        "captions": [caption.text for caption in captions],
        # One list of [start, end, kind] per caption, see Word; null = packed without words.
        "words": [caption.words for caption in captions] if captions[0].words is not None else None,
        "video_id": clip.video_id,
        "frame_times_s": times_s,  # of the stored frames; empty in the video layout
        "span_s": clip.span,  # cut out of the source; null = the whole source
        "source_size": [info.width, info.height],
        "fps": round(info.frame_rate_hz, 6),
        "duration_s": info.duration_s,  # of the source
    }


def _frames(
    clip: Clip, opened: _Source, settings: PackSettings, adjusted: set[str]
) -> tuple[list[bytes], tuple[float, ...]]:
    """Returns the clip's JPEGs and their times. Pictures are converted as they come."""
    jpegs: list[bytes] = []

    def add(rows: range, num_rows: int, picture: np.ndarray) -> None:
        if not rows.start:
            jpegs.clear()
        if settings.short_side is not None:
            picture = resize_short_side(picture[None], settings.short_side)[0]
        jpegs.extend([encode_jpeg(picture, settings.jpeg_quality)] * len(rows))

    times_s = visit_frames(
        opened.source,
        settings.num_frames,
        add,
        span=clip.span,
        key=clip.key,
        indices=opened.indices,
        spacing=settings.frame_spacing,
        adjusted=adjusted,
    )
    return jpegs, times_s


def describe_source(source: Source, key: str) -> tuple[SourceIndices, VideoInfo]:
    """Returns the packets and properties of a video that is to be packed or adopted.

    Raises BadSample for a source that cannot be used, before a frame of it is decoded.
    """
    check_whole(source, key)
    indices = SourceIndices(source)
    return indices, describe_video(source, key=key, indices=indices)


def _open_source(clip: Clip, alive: Alive) -> _Source:
    content_hash = ContentHash()
    file = _read_source(clip, content_hash.update, lambda: alive(0))
    try:
        alive(file.num_bytes)
        indices, info = describe_source(file.source, clip.key)
    except BaseException:
        file.close()
        raise
    return _Source(file, content_hash, indices, info)


def _read_source(
    clip: Clip, on_part: Callable[[bytes], object], alive: Callable[[], object]
) -> SourceFile:
    try:
        return read_source(clip.video, on_part=on_part, alive=alive)
    except NotAFileError as error:
        raise BadSample(clip.key, "missing_file", str(error)) from error
    except ChangedFileError as error:
        raise BadSample(clip.key, "read_error", str(error)) from error
    except (ValueError, TypeError) as error:
        # fsspec and its clients refuse a URL that they cannot understand in these ways.
        detail = f"its URL cannot be opened: {type(error).__name__}: {error}"
        raise BadSample(clip.key, "missing_file", detail) from error
    except OSError as error:
        if is_passing_error(error):
            raise StorageUnavailable(
                f"the storage of {clip.key}'s video fails for the moment; complete shards are kept:"
                f" repeat the command to resume: {error}"
            ) from error
        gone = isinstance(error, FileNotFoundError) or isinstance(error.__cause__, MISSING)
        reason = "missing_file" if gone else "read_error"
        raise BadSample(clip.key, reason, f"{type(error).__name__}: {error}") from error


def _check_unchanged(clip: Clip, file: SourceFile) -> None:
    try:
        file.check_unchanged()
    except ChangedFileError as error:
        raise BadSample(clip.key, "read_error", str(error)) from error
