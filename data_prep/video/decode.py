"""Samples exact frames from video files with PyAV."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from tvr.data_prep.records import BadSample
from tvr.data_prep.video.frame_index import (
    FrameIndex,
    FrameIndexMismatch,
    Source,
    SourceIndices,
    open_video,
)
from tvr.data_prep.video.frame_sampling import (
    FrameSpacing,
    Span,
    check_span,
    segment_frames,
    timed_frames,
)
from tvr.data_prep.video.indexed_decode import decode_frames, decode_indexed, with_keyframes
from tvr.data_prep.video.picture import PicturePainter, fit_picture, warn_once

OnOpen = Callable[[InputContainer, VideoStream], object]
FrameDecoder = Callable[
    [Source, FrameIndex, Sequence[int], str, OnOpen], Iterator[tuple[int, VideoFrame]]
]
Finish = Callable[[np.ndarray], np.ndarray]
"""Makes (H, W, 3) uint8 of a picture (H, W, 3), such as a smaller one; all of one shape."""
Visit = Callable[[range, int, np.ndarray], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """Properties of a container's video stream."""

    container: str
    """libav's name, such as "mov,mp4,m4a,3gp,3g2,mj2"."""
    num_frames: int
    """Packets that are presented."""
    width: int
    """Pixels as stored, before any rotation."""
    height: int
    frame_rate_hz: float
    duration_s: float


def sample_frames(
    source: Source,
    num_frames: int,
    *,
    span: Span | None = None,
    offsets: Sequence[float] | None = None,
    key: str = "video",
    frame_index: FrameIndex | None = None,
    adjusted: set[str] | None = None,
    finish: Finish | None = None,
    spacing: FrameSpacing = "time",
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Decodes one frame from each of `num_frames` equal segments of a video or a span of it.

    Args:
        offsets: Position within each segment, see `timed_frames`.
        key: Name of the sample in error messages.
        frame_index: Index that was stored with the video, whose frames are known to be whole; see
            `decode_indexed`. None = list the packets of the container.
        adjusted: Receives the names in ADJUSTMENTS of what the pictures needed.
        finish: Applied to each picture as it comes, so that only its results are held.
        spacing: "time": segments of equal time, see `timed_frames`; "index": of equally many
            frames, see `segment_frames`. Both are the same for a constant frame rate.

    Returns:
        Frames (F, H, W, 3) uint8 RGB as a player shows them, all of the first one's size, and the
        time of each in seconds from the first frame of the span. F is `num_frames`, or the number
        of frames in the span if that is smaller.

    Raises:
        BadSample: "unreadable" (damaged, truncated, unknown format), "no_frames" (in the span),
            "out_of_memory" or "missing_file".
        ValueError: a span or offsets are out of range.
    """
    frames: np.ndarray = np.empty((0, 0, 0, 3), dtype=np.uint8)

    def keep(rows: range, num_rows: int, picture: np.ndarray) -> None:
        nonlocal frames
        kept = picture if finish is None else finish(picture)
        if not rows.start:
            frames = np.empty((num_rows, *kept.shape), dtype=np.uint8)
        frames[rows.start : rows.stop] = kept

    times_s = visit_frames(
        source,
        num_frames,
        keep,
        span=span,
        offsets=offsets,
        key=key,
        frame_index=frame_index,
        adjusted=adjusted,
        spacing=spacing,
    )
    return frames, times_s


def visit_frames(
    source: Source,
    num_frames: int,
    visit: Visit,
    *,
    span: Span | None = None,
    offsets: Sequence[float] | None = None,
    key: str = "video",
    frame_index: FrameIndex | None = None,
    indices: SourceIndices | None = None,
    adjusted: set[str] | None = None,
    spacing: FrameSpacing = "time",
) -> tuple[float, ...]:
    """Decodes the frames of `sample_frames`, and holds one picture at a time.

    Args:
        visit: Receives each picture as it comes: the rows that show it, in ascending order, the
            number of rows, and the picture (H, W, 3). A decode that is repeated with another index
            begins again at row 0.
        indices: Indices of the source, for a source that is sampled many times.

    Returns the time of each row. Arguments and errors are those of `sample_frames`.
    """
    check_span(span)

    def sample(index: FrameIndex, decode: FrameDecoder = decode_frames) -> tuple[float, ...]:
        chosen, times_s = choose_frames(index, num_frames, span, offsets, key, spacing)
        painter = PicturePainter(key)
        height = width = 0
        for number, frame in shown_frames(source, index, chosen, key, painter, decode):
            picture = painter.picture(frame)
            if not height:
                height, width = picture.shape[:2]
            elif picture.shape[:2] != (height, width):
                painter.adjusted.add("size_change")
                picture = fit_picture(picture, width, height)
            rows = range(bisect_left(chosen, number), bisect_right(chosen, number))
            visit(rows, len(chosen), picture)
        if adjusted is not None:
            adjusted.update(painter.adjusted)
        return times_s

    if frame_index is not None:
        try:
            return sample(frame_index, decode_indexed)
        except FrameIndexMismatch as error:
            text = f"{key}: its stored frame index is not used, reads take longer: {error}"
            warn_once("stored frame index", text)
    return (indices or SourceIndices(source)).apply(sample, key)


def shown_frames(
    source: Source,
    frame_index: FrameIndex,
    wanted: Sequence[int],
    key: str,
    painter: PicturePainter,
    decode: FrameDecoder = decode_frames,
) -> Iterator[tuple[int, VideoFrame]]:
    """Yields the wanted frames once each, in ascending order, as `decode` does.

    `painter` is ready to convert the frame that is yielded.
    """
    is_wanted = set(wanted)
    decoded = with_keyframes(frame_index, wanted)
    skips_first = bool(decoded) and decoded[0] > 0
    start = partial(painter.open, source=source, skips_first=skips_first)
    for index, frame in decode(source, frame_index, decoded, key, start):
        painter.see(frame)
        if index in is_wanted:
            yield index, frame


def choose_frames(
    frame_index: FrameIndex,
    num_frames: int,
    span: Span | None,
    offsets: Sequence[float] | None,
    key: str,
    spacing: FrameSpacing,
) -> tuple[list[int], tuple[float, ...]]:
    """Returns the indices and times of the frames that `sample_frames` samples."""
    within = frame_index.within(span, key)
    if spacing == "time":
        ticks = [frame_index.ticks(i) for i in within]
        places = timed_frames(ticks, num_frames, offsets)
    else:
        places = segment_frames(len(within), num_frames, offsets)
    chosen = [within[i] for i in places]
    first_s = frame_index.time_s(within[0])
    return chosen, tuple(round(frame_index.time_s(i) - first_s, 6) for i in chosen)


def check_frames(
    source: Source,
    *,
    key: str = "video",
    adjusted: set[str] | None = None,
    indices: SourceIndices | None = None,
) -> FrameIndex:
    """Decodes every frame once, and returns their index.

    Raises BadSample as `sample_frames`, for damage anywhere.

    Args:
        adjusted: Receives the names in ADJUSTMENTS of what the first picture needs.
        indices: Indices of the source, if others need them, too.
    """
    frame_index = (indices or SourceIndices(source)).decoded(key)
    if adjusted is not None:
        adjusted.update(first_frame(source, key)[1].adjusted)
    return frame_index


def first_frame(source: Source, key: str) -> tuple[VideoFrame, PicturePainter]:
    """Decodes the first frame. Raises BadSample as `sample_frames`."""
    painter = PicturePainter(key)
    with open_video(source, key) as (container, stream):
        painter.open(container, stream)
        for frame in container.decode(stream):
            painter.see(frame)
            painter.note(frame)
            return frame, painter
    raise BadSample(key, "no_frames", "the decoder returned no picture")


def describe_video(
    source: Source, *, key: str = "video", indices: SourceIndices | None = None
) -> VideoInfo:
    """Reads the container's packets without decoding them. Raises BadSample as `sample_frames`.

    Args:
        indices: Indices of the source, if others need them, too.
    """
    num_frames = (indices or SourceIndices(source)).packets(key).num_frames
    with open_video(source, key) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        return VideoInfo(
            container=container.format.name,
            num_frames=num_frames,
            width=stream.width,
            height=stream.height,
            frame_rate_hz=rate,
            duration_s=_duration_s(container, stream) or (num_frames / rate if rate else 0.0),
        )


def _duration_s(container: InputContainer, stream: VideoStream) -> float:
    if stream.duration is not None and stream.time_base is not None:
        return round(float(stream.duration * stream.time_base), 6)
    return round(container.duration / av.time_base, 6) if container.duration else 0.0
