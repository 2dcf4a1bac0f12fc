"""When the frames of a video are shown, and the frames themselves, with PyAV."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import dropwhile, islice, pairwise
from os import PathLike, fspath
from typing import TypeVar

import av
import av.error
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from tvr.data_prep.records import BadSample
from tvr.data_prep.video.frame_sampling import Span, frames_within

# Containers with an index, as libav calls them.
SEEKABLE = {"mov", "matroska"}

Source = bytes | str | PathLike[str]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameIndex:
    """The frames that a video shows, in the order it shows them."""

    pts: tuple[int, ...] | None
    """Their time stamps, strictly ascending; None: the container has none to rely on."""
    num_frames: int
    keyframes: tuple[int, ...]
    """Frames at which decoding may start, besides the first one."""
    unit_s: Fraction
    """Of a time stamp; without any, the time from one frame to the next."""
    rate_hz: Fraction
    """On average."""
    stream: int
    """Its number in the container."""

    def ticks(self, index: int) -> int:
        """When a frame is shown, in units since the first one: many containers do not start at
        0."""
        return index if self.pts is None else self.pts[index] - self.pts[0]

    @property
    def times_s(self) -> list[float]:
        """The same for all frames, in seconds to the microsecond."""
        return [round(float(self.ticks(i) * self.unit_s), 6) for i in range(self.num_frames)]

    def within(self, span: Span | None, key: str) -> range:
        """The frames of a span. Raises BadSample("no_frames") where there are none."""
        found = frames_within(self.times_s, span)
        if not found:
            detail = f"none of {self.num_frames} frames, the last at {self.times_s[-1]} s, is in"
            raise BadSample(key, "no_frames", f"{detail} {span}")
        return found


class FrameIndexMismatch(Exception):
    """The decoder's frames are not those of the timeline."""


@contextmanager
def opened(source: Source, key: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream that is no cover picture; libav's errors become
    BadSample."""
    file = io.BytesIO(source) if isinstance(source, bytes) else fspath(source)
    try:
        # Tags in another encoding than UTF-8 are common and of no interest here.
        with av.open(file, "r", metadata_errors="replace") as container:
            streams = [
                s for s in container.streams.video if not s.disposition & Disposition.attached_pic
            ]
            if not streams:
                raise BadSample(key, "no_frames", "the file has no video stream")
            # Loader workers are the parallelism; a decoder's own threads would only compete with
            # them.
            streams[0].codec_context.thread_count = 1
            yield container, streams[0]
    except av.error.FFmpegError as error:
        reason = "missing_file" if isinstance(error, FileNotFoundError) else "unreadable"
        raise BadSample(key, reason, f"{error.strerror} ({type(error).__name__})") from error


def with_timeline(source: Source, key: str, act: Callable[[FrameIndex], Result]) -> Result:
    """Calls `act` with the index of the packets and, if that raises FrameIndexMismatch, with that
    of the decoder.

    Field-coded pictures may have two packets a frame, and leading ones may be undecodable: what the
    decoder gives is the truth, but only decoding all of it tells.
    """
    try:
        return act(packet_timeline(source, key))
    except FrameIndexMismatch:
        pass
    try:
        return act(decoded_timeline(source, key))
    except FrameIndexMismatch as error:
        raise BadSample(key, "unreadable", f"each decoding gives other frames: {error}") from error


def packet_timeline(source: Source, key: str) -> FrameIndex:
    """Reads the container's packets without decoding them. Raises BadSample for a file that lacks
    some."""
    shown = []
    num_packets = 0
    with opened(source, key) as (container, stream):
        for packet in container.demux(stream):
            if packet.size:
                num_packets += 1
                if not packet.is_discard:
                    shown.append((packet.pts, packet.is_keyframe))
            if packet.is_corrupt:
                raise BadSample(key, "unreadable", f"packet {num_packets} is truncated or damaged")
        # An MP4 index lists every packet before one is read; a file cut between two packets just
        # ends early.
        promised = len(stream.index_entries)
        if num_packets < promised:
            raise BadSample(
                key, "unreadable", f"truncated: {num_packets} of {promised} packets are there"
            )
        if not shown:
            raise BadSample(key, "no_frames", "the video stream has no packets")
        if all(pts is not None for pts, _ in shown):
            shown.sort()
        # Others, such as transport streams, find a time only roughly.
        seeks = bool(SEEKABLE & set(container.format.name.split(",")))
        keyframes = tuple(index for index, (_, is_key) in enumerate(shown) if is_key and seeks)
        return _timeline(stream, [pts for pts, _ in shown], keyframes)


def decoded_timeline(source: Source, key: str) -> FrameIndex:
    """Decodes all frames. Raises BadSample for a damaged one."""
    with opened(source, key) as (container, stream):
        stamps = [frame.pts for frame in _sound(container.decode(stream), key)]
        if not stamps:
            raise BadSample(key, "no_frames", "the decoder gave no picture")
        return _timeline(stream, stamps, ())


def decoded_frames(
    source: Source, timeline: FrameIndex, wanted: Iterable[int], key: str
) -> Iterator[tuple[int, VideoFrame]]:
    """The wanted frames, ascending, each with its index.

    Decoding starts anew at a keyframe wherever that skips some, and every frame's time stamp is
    held against the timeline: a seek alone gives wrong pictures around B-frames.

    Raises:
        FrameIndexMismatch: the decoder's frames are other ones.
        BadSample: a frame is damaged.
    """
    with opened(source, key) as (container, stream):
        frames = container.decode(stream)
        decoded, sought = -1, False  # index of the last frame, and whether it was counted from 0
        for index in wanted:
            start = _keyframe_before(timeline, index)
            if start > decoded + 1:
                frames = _frames_from(container, stream, timeline, start)
                decoded, sought = start - 1, True
            frame = None
            for frame in islice(frames, index - decoded):
                decoded += 1
                if frame.is_corrupt and not sought:
                    raise _damaged(decoded, key)
                if frame.is_corrupt or not _fits(timeline, decoded, frame):
                    raise FrameIndexMismatch(f"frame {decoded} is another one")
            if frame is None or decoded < index:
                raise FrameIndexMismatch(f"frame {index} is missing")
            yield index, frame
        if timeline.pts is None:  # their number is all there is to compare
            count = decoded + 1 + sum(1 for _ in _sound(frames, key))
            if count != timeline.num_frames:
                raise FrameIndexMismatch(f"{count} frames instead of {timeline.num_frames}")


def _keyframe_before(timeline: FrameIndex, index: int) -> int:
    place = bisect_right(timeline.keyframes, index)
    return timeline.keyframes[place - 1] if place else 0


def _frames_from(
    container: InputContainer, stream: VideoStream, timeline: FrameIndex, start: int
) -> Iterator[VideoFrame]:
    assert timeline.pts is not None, "keyframes are told by their time stamps"
    pts = timeline.pts[start]
    container.seek(pts, stream=stream)
    # Pictures shown before the keyframe may refer to what was skipped.
    return dropwhile(
        lambda frame: frame.pts is not None and frame.pts < pts, container.decode(stream)
    )


def _fits(timeline: FrameIndex, index: int, frame: VideoFrame) -> bool:
    if index >= timeline.num_frames:
        return False
    return timeline.pts is None or frame.pts == timeline.pts[index]


def _sound(frames: Iterable[VideoFrame], key: str) -> Iterator[VideoFrame]:
    """Refuses a damaged frame: libav fills the hole with invented pixels."""
    for index, frame in enumerate(frames):
        if frame.is_corrupt:
            raise _damaged(index, key)
        yield frame


def _damaged(index: int, key: str) -> BadSample:
    return BadSample(key, "unreadable", f"frame {index} is damaged")


def _timeline(
    stream: VideoStream, stamps: Sequence[int | None], keyframes: Sequence[int]
) -> FrameIndex:
    """`stamps` in the order of showing, or of the file where they are not to be relied on."""
    pts = tuple(stamp for stamp in stamps if stamp is not None)
    # AVI has none; what libav makes up for its frames does not even ascend.
    is_usable = (
        len(pts) == len(stamps)
        and stream.time_base is not None
        and all(first < second for first, second in pairwise(pts))
    )
    rate_hz = Fraction(stream.average_rate or stream.guessed_rate or 25)
    return FrameIndex(
        pts=pts if is_usable else None,
        num_frames=len(stamps),
        keyframes=tuple(keyframes) if is_usable else (),
        unit_s=stream.time_base if is_usable and stream.time_base else 1 / rate_hz,
        rate_hz=rate_hz,
        stream=stream.index,
    )
