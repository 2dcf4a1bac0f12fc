"""Samples exact frames from video files with PyAV."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from tvr.data_prep.records import BadSample
from tvr.data_prep.video.frame_index import (
    FrameIndex,
    FrameIndexMismatch,
    Source,
    decode_frames,
    index_decoded_frames,
    index_packets,
    open_video,
    with_frame_index,
)
from tvr.data_prep.video.frame_sampling import Span, check_span, segment_frames
from tvr.data_prep.video.indexed_decode import decode_indexed

FrameDecoder = Callable[[Source, FrameIndex, list[int], str], Iterator[tuple[int, VideoFrame]]]


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
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Decodes one frame from each of `num_frames` equal segments of a video or a span of it.

    Args:
        offsets: Position within each segment, see `segment_frames`.
        key: Name of the sample in error messages.
        frame_index: Index that was stored with the video, whose frames are known to be whole; see
            `decode_indexed`. None = list the packets of the container.

    Returns:
        Upright frames (F, H, W, 3) uint8 RGB, and the time of each in seconds from the first frame
        of the span. F is `num_frames`, or the number of frames in the span if that is smaller.

    Raises:
        BadSample: "unreadable" (damaged, truncated, unknown format), "no_frames" (in the span) or
            "missing_file".
        ValueError: a span or offsets are out of range.
    """
    check_span(span)

    def sample(
        index: FrameIndex, decode: FrameDecoder = decode_frames
    ) -> tuple[np.ndarray, tuple[float, ...]]:
        chosen, times_s = choose_frames(index, num_frames, span, offsets, key)
        scaler = VideoReformatter()  # one per frame would take four times as long
        frames = {
            number: upright(frame, scaler)
            for number, frame in decode(source, index, sorted(set(chosen)), key)
        }
        if len({frame.shape for frame in frames.values()}) > 1:
            raise BadSample(key, "unreadable", "the picture size changes within the video")
        return np.stack([frames[number] for number in chosen]), times_s

    if frame_index is not None:
        try:
            return sample(frame_index, decode_indexed)
        except FrameIndexMismatch:
            pass
    return with_frame_index(source, key, sample)


def choose_frames(
    frame_index: FrameIndex,
    num_frames: int,
    span: Span | None,
    offsets: Sequence[float] | None,
    key: str,
) -> tuple[list[int], tuple[float, ...]]:
    """Returns the indices and times of the frames that `sample_frames` samples."""
    within = frame_index.within(span, key)
    chosen = [within[i] for i in segment_frames(len(within), num_frames, offsets)]
    first_s = frame_index.time_s(within[0])
    return chosen, tuple(round(frame_index.time_s(i) - first_s, 6) for i in chosen)


def check_frames(source: Source, *, key: str = "video") -> FrameIndex:
    """Decodes every frame once, and returns their index.

    Raises BadSample as `sample_frames`, for damage anywhere.
    """
    return index_decoded_frames(source, key)


def describe_video(source: Source, *, key: str = "video") -> VideoInfo:
    """Reads the container's packets without decoding them. Raises BadSample as `sample_frames`."""
    num_frames = index_packets(source, key).num_frames
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


def upright(frame: VideoFrame, scaler: VideoReformatter) -> np.ndarray:
    """Converts a frame to RGB (H, W, 3) uint8 and applies the container's rotation."""
    picture = scaler.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.rot90(picture, k=round(frame.rotation / 90) % 4)  # counter-clockwise degrees


def _duration_s(container: InputContainer, stream: VideoStream) -> float:
    if stream.duration is not None and stream.time_base is not None:
        return round(float(stream.duration * stream.time_base), 6)
    return round(container.duration / av.time_base, 6) if container.duration else 0.0
