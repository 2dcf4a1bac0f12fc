"""Exact frame sampling from video files with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
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
    Source,
    decoded_frames,
    decoded_timeline,
    opened,
    packet_timeline,
    with_timeline,
)
from tvr.data_prep.video.frame_sampling import Span, check_span, segment_frames


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What the container says of its video stream; `num_frames` counts the packets that are
    shown."""

    container: str
    """libav's name, such as "mov,mp4,m4a,3gp,3g2,mj2"."""
    num_frames: int
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
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Decodes one frame out of each of `num_frames` equal segments of the video, or of a span of
    it, upright: those that `segment_frames` names.

    Returns uint8 RGB (F, H, W, 3) and the second each is shown at, counted from the first frame of
    the span. F is `num_frames`, or less where there are fewer: then every frame there is.

    Raises:
        BadSample: "unreadable" (damaged, truncated, unknown format) or "no_frames" (in the span).
        ValueError: a span or offsets out of range.
    """
    check_span(span)

    def sample(timeline: FrameIndex) -> tuple[np.ndarray, tuple[float, ...]]:
        chosen, times_s = choose(timeline, num_frames, span, offsets, key)
        scaler = VideoReformatter()  # a new one for each frame takes four times as long
        frames = {
            index: upright(frame, scaler)
            for index, frame in decoded_frames(source, timeline, sorted(set(chosen)), key)
        }
        if len({frame.shape for frame in frames.values()}) > 1:
            raise BadSample(key, "unreadable", "the picture size changes within the video")
        return np.stack([frames[index] for index in chosen]), times_s

    return with_timeline(source, key, sample)


def choose(
    timeline: FrameIndex,
    num_frames: int,
    span: Span | None,
    offsets: Sequence[float] | None,
    key: str,
) -> tuple[list[int], tuple[float, ...]]:
    """The frames that `sample_frames` takes, with their times."""
    within, times_s = timeline.within(span, key), timeline.times_s
    chosen = [within[i] for i in segment_frames(len(within), num_frames, offsets)]
    return chosen, tuple(round(times_s[i] - times_s[within[0]], 6) for i in chosen)


def check_frames(source: Source, *, key: str = "video") -> None:
    """Decodes every frame once. Raises BadSample as `sample_frames` does, for damage anywhere."""
    decoded_timeline(source, key)


def describe_video(source: Source, *, key: str = "video") -> VideoInfo:
    """Reads the container's packets without decoding them. Raises BadSample as `sample_frames`
    does."""
    num_frames = packet_timeline(source, key).num_frames
    with opened(source, key) as (container, stream):
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
    """RGB (H, W, 3) with the container's rotation (counter-clockwise degrees) applied."""
    picture = scaler.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.rot90(picture, k=round(frame.rotation / 90) % 4)


def _duration_s(container: InputContainer, stream: VideoStream) -> float:
    if stream.duration is not None and stream.time_base is not None:
        return round(float(stream.duration * stream.time_base), 6)
    return round(container.duration / av.time_base, 6) if container.duration else 0.0
