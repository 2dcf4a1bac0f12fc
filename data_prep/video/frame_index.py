"""Indexes the frames of a video by presentation time, and decodes frames by index, with PyAV."""

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
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from tvr.data_prep.containers.elements import mapped
from tvr.data_prep.containers.mpeg import count_joins
from tvr.data_prep.records import BadSample
from tvr.data_prep.video.frame_sampling import Span, frames_within
from tvr.data_prep.video.images import MAX_PIXELS
from tvr.data_prep.video.streams import choose_video_stream

# libav's names of the containers that a clip may have. Others hold no video, or only refer to other
# files and addresses, which libav would open: playlists (hls, dash, concat), sdp, image sequences.
CONTAINERS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "gif"),
    *("h264", "hevc", "m4v", "ivf", "av1", "obu", "mxf", "dv", "nut", "rm", "yuv4mpegpipe"),
)
OPENING = {
    "format_whitelist": ",".join(CONTAINERS),
    # Neither the source nor anything in it may name another way to bytes: no network, no `concat:`.
    "protocol_whitelist": "file",
}
# libav's names of containers with an exact index.
SEEKABLE = {"mov", "matroska"}

Source = bytes | str | PathLike[str]
Result = TypeVar("Result")
OnPacket = Callable[[InputContainer, VideoStream, Packet], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameIndex:
    """The frames of a video in presentation order."""

    pts: tuple[int, ...] | None
    """Presentation time stamps, strictly ascending; None = the container has no reliable ones."""
    num_frames: int
    keyframes: tuple[int, ...]
    """Frames besides the first one at which decoding can start."""
    unit_s: Fraction
    """Seconds per time stamp unit; seconds per frame if `pts` is None."""
    rate_hz: Fraction
    """Average frame rate."""
    stream: int
    """Index of the video stream in the container."""

    def ticks(self, index: int) -> int:
        """Returns a frame's time in units of `unit_s` since the first frame.

        The first frame of many containers is not at 0.
        """
        return index if self.pts is None else self.pts[index] - self.pts[0]

    @property
    def times_s(self) -> list[float]:
        """Times of all frames in seconds since the first frame, rounded to microseconds."""
        return [self.time_s(index) for index in range(self.num_frames)]

    def time_s(self, index: int) -> float:
        """Returns a frame's time in seconds since the first frame, rounded to microseconds."""
        return round(float(self.ticks(index) * self.unit_s), 6)

    def within(self, span: Span | None, key: str) -> range:
        """Returns the frames in a span. Raises BadSample("no_frames") if there are none."""
        if span is None:
            return range(self.num_frames)
        found = frames_within(self.times_s, span)
        if not found:
            detail = f"none of {self.num_frames} frames, the last at {self.times_s[-1]} s, is in"
            raise BadSample(key, "no_frames", f"{detail} {span}")
        return found


class FrameIndexMismatch(Exception):
    """The decoder's frames differ from the index."""


@contextmanager
def open_video(source: Source, key: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a container and its video stream, see `choose_video_stream`.

    libav's errors become BadSample.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else fspath(source)
    try:
        # Tags in encodings other than UTF-8 are common, and unused here.
        with av.open(file, "r", metadata_errors="replace", container_options=OPENING) as container:
            stream = choose_video_stream(container)
            if stream is None:
                raise BadSample(key, "no_frames", "the file has no video stream")
            context = stream.codec_context
            if context is None:
                raise BadSample(key, "unreadable", "no decoder for the video's codec")
            if context.width * context.height > MAX_PIXELS:
                size = f"{context.width} x {context.height} pixels"
                raise BadSample(key, "unreadable", f"pictures of {size}, more than {MAX_PIXELS}")
            # Also for a picture size that changes later.
            context.options = {**context.options, "max_pixels": str(MAX_PIXELS)}
            # Loader workers already use all cores; decoder threads would compete with them.
            context.thread_count = 1
            yield container, stream
    except MemoryError as error:
        raise BadSample(key, "out_of_memory", "no memory to decode the video") from error
    except av.error.FFmpegError as error:
        reason = "missing_file" if isinstance(error, FileNotFoundError) else "unreadable"
        detail = f"{error.strerror} ({type(error).__name__})"
        if isinstance(error, av.error.ArgumentError):
            detail += f"; a clip must be a file of one of the containers {', '.join(CONTAINERS)}"
        raise BadSample(key, reason, detail) from error


class SourceIndices:
    """The indices of a source that is decoded several times; each is made once, when needed.

    Field-coded pictures may have two packets a frame, and leading packets may be undecodable. The
    decoder's index is exact, but needs a decode of the whole video.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._made: dict[str, FrameIndex | BadSample] = {}

    def packets(self, key: str) -> FrameIndex:
        """Returns the packets' index, see `index_packets`."""
        return self._once("packets", index_packets, key)

    def decoded(self, key: str) -> FrameIndex:
        """Returns the decoder's index, see `index_decoded_frames`."""
        return self._once("decoded", index_decoded_frames, key)

    def apply(self, act: Callable[[FrameIndex], Result], key: str) -> Result:
        """Calls `act` with the packets' index, and on FrameIndexMismatch with the decoder's."""
        try:
            return act(self.packets(key))
        except FrameIndexMismatch:
            pass
        try:
            return act(self.decoded(key))
        except FrameIndexMismatch as error:
            detail = f"two decodes give different frames: {error}"
            raise BadSample(key, "unreadable", detail) from error

    def _once(self, name: str, make: Callable[[Source, str], FrameIndex], key: str) -> FrameIndex:
        if name not in self._made:
            try:
                self._made[name] = make(self._source, key)
            except BadSample as error:
                # Without its traceback, which would keep the source in memory.
                self._made[name] = BadSample(key, error.reason, error.detail)
        made = self._made[name]
        if isinstance(made, BadSample):
            raise BadSample(key, made.reason, made.detail)
        return made


def index_packets(source: Source, key: str, on_packet: OnPacket | None = None) -> FrameIndex:
    """Indexes the container's packets without decoding. Raises BadSample if packets are missing.

    Args:
        on_packet: Called for each packet.
    """
    shown = []
    num_packets = num_suspect = 0
    with open_video(source, key) as (container, stream):
        for packet in container.demux(stream):
            if packet.size:
                if on_packet is not None:
                    on_packet(container, stream, packet)
                num_packets += 1
                if not packet.is_discard:
                    shown.append((packet.pts, packet.is_keyframe))
            if packet.is_corrupt:
                num_suspect += 1
                if container.format.name != "mpegts":
                    detail = f"packet {num_packets} is truncated or damaged"
                    raise BadSample(key, "unreadable", detail)
        if num_suspect:
            _check_joins(source, stream.id, num_suspect, key)
        # The MP4 index lists every packet, so a file cut between two packets is detected.
        num_indexed = len(stream.index_entries)
        if num_packets < num_indexed:
            raise BadSample(
                key, "unreadable", f"truncated: {num_packets} of {num_indexed} packets are present"
            )
        if not shown:
            raise BadSample(key, "no_frames", "the video stream has no packets")
        if all(pts is not None for pts, _ in shown):
            shown.sort()
        # Other containers, such as transport streams, seek only approximately.
        seeks = bool(SEEKABLE & set(container.format.name.split(",")))
        keyframes = tuple(index for index, (_, is_key) in enumerate(shown) if is_key and seeks)
        return _build_index(stream, [pts for pts, _ in shown], keyframes)


def _check_joins(source: Source, pid: int, num_suspect: int, key: str) -> None:
    """Raises BadSample unless all suspect packets of a transport stream are the last ones before
    another recording that was appended, where libav takes packets for lost."""
    with mapped(source) as content:
        joins, losses = count_joins(content, pid)
    if losses or num_suspect > joins:
        detail = f"{num_suspect} packets are truncated or damaged, or packets before them are lost"
        raise BadSample(key, "unreadable", detail)


def index_decoded_frames(source: Source, key: str) -> FrameIndex:
    """Indexes all frames by decoding them. Raises BadSample for a damaged frame."""
    with open_video(source, key) as (container, stream):
        stamps = [frame.pts for frame in _reject_damaged(container.decode(stream), key)]
        if not stamps:
            raise BadSample(key, "no_frames", "the decoder returned no picture")
        return _build_index(stream, stamps, ())


def decode_frames(
    source: Source,
    frame_index: FrameIndex,
    wanted: Iterable[int],
    key: str,
    on_open: Callable[[InputContainer, VideoStream], object] = lambda container, stream: None,
) -> Iterator[tuple[int, VideoFrame]]:
    """Yields the wanted frames, each with its index.

    Decoding seeks to a keyframe where that skips frames. Every frame's time stamp is compared with
    the index, because a seek alone gives wrong pictures around B-frames.

    Args:
        wanted: Frame indices in ascending order.
        on_open: Called before the first frame is decoded.

    Raises:
        FrameIndexMismatch: the decoder's frames differ from the index.
        BadSample: a frame is damaged.
    """
    with open_video(source, key) as (container, stream):
        on_open(container, stream)
        frames = container.decode(stream)
        decoded, has_seeked = -1, False  # index of the last decoded frame
        for index in wanted:
            start = keyframe_before(frame_index, index)
            if start > decoded + 1:
                frames = _frames_from(container, stream, frame_index, start)
                decoded, has_seeked = start - 1, True
            frame = None
            for frame in islice(frames, index - decoded):
                decoded += 1
                if frame.is_corrupt and not has_seeked:
                    raise _damaged(decoded, key)
                if frame.is_corrupt or not _fits(frame_index, decoded, frame):
                    raise FrameIndexMismatch(f"frame {decoded} differs")
            if frame is None or decoded < index:
                raise FrameIndexMismatch(f"frame {index} is missing")
            yield index, frame
        if frame_index.pts is None:  # only the number of frames can be compared
            count = decoded + 1 + sum(1 for _ in _reject_damaged(frames, key))
            if count != frame_index.num_frames:
                raise FrameIndexMismatch(f"{count} frames instead of {frame_index.num_frames}")


def with_keyframes(frame_index: FrameIndex, wanted: Iterable[int]) -> list[int]:
    """Returns the wanted frames, and the frames decoded before them that may say how all the
    following ones are shown: the keyframe before each, or all frames if keyframes are unknown."""
    chosen = sorted(set(wanted))
    if not frame_index.keyframes:
        return list(range(chosen[-1] + 1)) if chosen else []
    return sorted({*chosen, *(keyframe_before(frame_index, index) for index in chosen)})


def keyframe_before(frame_index: FrameIndex, index: int) -> int:
    """Returns the frame at which a decode of frame `index` starts."""
    count = bisect_right(frame_index.keyframes, index)
    return frame_index.keyframes[count - 1] if count else 0


def _frames_from(
    container: InputContainer, stream: VideoStream, frame_index: FrameIndex, start: int
) -> Iterator[VideoFrame]:
    assert frame_index.pts is not None, "keyframes have time stamps"
    pts = frame_index.pts[start]
    container.seek(pts, stream=stream)
    # Frames presented before the keyframe may refer to skipped frames.
    return dropwhile(
        lambda frame: frame.pts is not None and frame.pts < pts, container.decode(stream)
    )


def _fits(frame_index: FrameIndex, index: int, frame: VideoFrame) -> bool:
    if index >= frame_index.num_frames:
        return False
    return frame_index.pts is None or frame.pts == frame_index.pts[index]


def _reject_damaged(frames: Iterable[VideoFrame], key: str) -> Iterator[VideoFrame]:
    """Raises BadSample for a damaged frame, which libav fills with invented pixels."""
    for index, frame in enumerate(frames):
        if frame.is_corrupt:
            raise _damaged(index, key)
        yield frame


def _damaged(index: int, key: str) -> BadSample:
    return BadSample(key, "unreadable", f"frame {index} is damaged")


def _build_index(
    stream: VideoStream, stamps: Sequence[int | None], keyframes: Sequence[int]
) -> FrameIndex:
    """Builds an index; `stamps` are in presentation order, or in file order if some are None."""
    pts = tuple(stamp for stamp in stamps if stamp is not None)
    # AVI has no time stamps, and those that libav invents for it do not ascend.
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
