"""Indexes the frames of a video by presentation time, with PyAV."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from os import PathLike, fspath
from typing import NamedTuple, TypeVar

import av
import av.error
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from tvr.data_prep.containers.elements import mapped
from tvr.data_prep.containers.mpeg import count_joins
from tvr.data_prep.records import BadSample
from tvr.data_prep.video.frame_sampling import LONGEST_STEP_S, Span, frames_within, mend_stamps
from tvr.data_prep.video.images import MAX_PIXELS
from tvr.data_prep.video.picture import warn_once
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
# No codec shows a picture more than this number of pictures after it was decoded.
MAX_REORDERED = 32

Source = bytes | str | PathLike[str]
Result = TypeVar("Result")
OnPacket = Callable[[InputContainer, VideoStream, Packet], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameIndex:
    """The frames of a video in presentation order."""

    pts: tuple[int, ...] | None
    """Presentation times, strictly ascending; None = the container has no time stamps."""
    num_frames: int
    keyframes: tuple[int, ...]
    """Frames besides the first one at which decoding can start."""
    unit_s: Fraction
    """Seconds per time stamp unit; seconds per frame if `pts` is None."""
    rate_hz: Fraction
    """Average frame rate."""
    stream: int
    """Index of the video stream in the container."""
    stamps: tuple[int | None, ...] | None = None
    """Time stamps that the decoder gives the frames, if `pts` was mended, see `mend_stamps`."""
    is_certain: bool = True
    """False: only a decode tells which frame is shown when."""

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
        """Returns the frames shown in a span. Raises BadSample("no_frames") if there are none."""
        if span is None:
            return range(self.num_frames)
        # Not of all frames' times: a film of many frames may have many cuts.
        last_shown_s = 1 / self.rate_hz if self.rate_hz else 0.0
        found = frames_within(range(self.num_frames), span, self.time_s, float(last_shown_s))
        if not found:
            last = f"{self.num_frames} frames, the last at {self.time_s(self.num_frames - 1)} s"
            raise BadSample(key, "no_frames", f"none of {last}, is in {span}")
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
    except IndexError as error:
        # PyAV lists the streams once, and cannot return a packet of one that begins later.
        if not _raised_by_pyav(error):
            raise
        raise BadSample(key, "unreadable", "another stream begins within the file") from error
    except av.error.FFmpegError as error:
        reason = "missing_file" if isinstance(error, FileNotFoundError) else "unreadable"
        detail = f"{error.strerror} ({type(error).__name__})"
        if isinstance(error, av.error.ArgumentError):
            detail += f"; a clip must be a file of one of the containers {', '.join(CONTAINERS)}"
        raise BadSample(key, reason, detail) from error


def _raised_by_pyav(error: Exception) -> bool:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and place.tb_frame.f_code.co_filename.startswith("av/")


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
        """Calls `act` with the packets' index; with the decoder's if the packets' is not certain,
        or on FrameIndexMismatch."""
        index = self.packets(key)
        try:
            if index.is_certain:
                return act(index)
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
    shown: list[_Listed] = []
    num_packets = num_suspect = 0
    with open_video(source, key) as (container, stream):
        for packet in container.demux(stream):
            if packet.size:
                if on_packet is not None:
                    on_packet(container, stream, packet)
                num_packets += 1
                if not packet.is_discard:
                    shown.append(_Listed(packet.pts, packet.dts, packet.is_keyframe))
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
        if all(packet.pts is None and packet.dts is None for packet in shown):
            return _build_index(stream, [None] * len(shown))
        if not _is_certain(shown, stream):
            return replace(_build_index(stream, [None] * len(shown)), is_certain=False)
        shown.sort()
        # Other containers, such as transport streams, seek only approximately.
        seeks = bool(SEEKABLE & set(container.format.name.split(",")))
        keyframes = [at for at, packet in enumerate(shown) if packet.is_keyframe and seeks]
        stamps, decode_times = [packet.pts for packet in shown], [packet.dts for packet in shown]
        times = _shown_times(container, stamps, decode_times)
        return _build_index(stream, times, keyframes, stamps)


class _Listed(NamedTuple):
    """What is known of a packet that is shown."""

    pts: int | None
    dts: int | None
    is_keyframe: bool


def _is_certain(shown: Sequence[_Listed], stream: VideoStream) -> bool:
    """True if time stamps of packets in file order say in which order the frames are shown."""
    stamps = [packet.pts for packet in shown if packet.pts is not None]
    if len(stamps) < len(shown):
        return False
    latest = keyframe = min(stamps) - 1
    for stamp, packet in zip(stamps, shown, strict=True):
        # A keyframe is shown after all that were decoded before it, and before all that are decoded
        # after it, except for those directly after it.
        is_late = stamp <= latest if packet.is_keyframe else stamp <= keyframe < latest
        if is_late:
            return False
        keyframe = stamp if packet.is_keyframe else keyframe
        latest = max(latest, stamp)
    order = sorted(range(len(stamps)), key=stamps.__getitem__)
    if any(abs(place - packet) > MAX_REORDERED for place, packet in enumerate(order)):
        return False
    longest = LONGEST_STEP_S / (stream.time_base or 1)
    return all(0 < stamps[b] - stamps[a] <= longest for a, b in pairwise(order))


def _check_joins(source: Source, pid: int, num_suspect: int, key: str) -> None:
    """Raises BadSample unless all suspect packets of a transport stream are the last ones before
    another recording that was appended, where libav takes packets for lost."""
    with mapped(source) as content:
        joins, losses = count_joins(content, pid)
    if losses or num_suspect > joins:
        detail = f"{num_suspect} packets are truncated or damaged, or packets before them are lost"
        raise BadSample(key, "unreadable", detail)


def index_decoded_frames(source: Source, key: str) -> FrameIndex:
    """Indexes all frames by decoding them. Raises BadSample for a damaged frame, and if most of the
    packets give no frame."""
    stamps: list[int | None] = []
    decode_times: list[int | None] = []
    with open_video(source, key) as (container, stream):
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                decode_times.append(packet.dts)
            for frame in packet.decode():
                if frame.is_corrupt:  # libav fills it with invented pixels
                    raise damaged_frame(len(stamps), key)
                stamps.append(frame.pts)
        if not stamps:
            raise BadSample(key, "no_frames", "the decoder returned no picture")
        # Field-coded pictures have two packets a frame.
        if 2 * len(stamps) < len(decode_times) - 1:
            detail = f"only {len(stamps)} of {len(decode_times)} packets give a picture"
            raise BadSample(key, "unreadable", detail)
        times = _shown_times(container, stamps, decode_times)
        index = _build_index(stream, times, stamps=stamps)
        if index.pts is not None and index.pts != tuple(times):
            warn_once("time stamps", f"time stamps are mended, for example those of {key}")
        return index


def _shown_times(
    container: InputContainer, stamps: Sequence[int | None], decode_times: Sequence[int | None]
) -> Sequence[int | None]:
    """Returns the stamps of frames in the order in which they are shown, or what replaces them.

    Where only decoding times are known, as in AVI, for which libav invents the others, frames are
    shown at these times, in another order and with a constant delay.
    """
    known = [stamp for stamp in stamps if stamp is not None]
    times = sorted(time for time in decode_times if time is not None)
    if len(times) != len(stamps) or (known and container.format.name != "avi"):
        return stamps
    delay = min(known) - times[0] if known else 0
    return [time + delay for time in times]


def damaged_frame(index: int, key: str) -> BadSample:
    """Returns the refusal of a video with a damaged frame."""
    return BadSample(key, "unreadable", f"frame {index} is damaged")


def _build_index(
    stream: VideoStream,
    times: Sequence[int | None],
    keyframes: Sequence[int] = (),
    stamps: Sequence[int | None] | None = None,
) -> FrameIndex:
    """Builds an index.

    Args:
        times: Times of the frames in the order in which they are shown.
        stamps: Time stamps that the decoder gives them; None = `times`.
    """
    rate_hz = Fraction(stream.average_rate or stream.guessed_rate or 25)
    unit_s, pts = stream.time_base, None
    if unit_s:
        pts = mend_stamps(times, unit_s, rate_hz)
    found = tuple(times if stamps is None else stamps)
    return FrameIndex(
        pts=pts,
        num_frames=len(times),
        keyframes=() if pts is None else tuple(keyframes),
        unit_s=1 / rate_hz if unit_s is None or pts is None else unit_s,
        rate_hz=rate_hz,
        stream=stream.index,
        stamps=None if pts is None or found == pts else found,
    )
