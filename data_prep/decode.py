"""Exact frame sampling from video files with PyAV."""

from __future__ import annotations

import io
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from os import PathLike, fspath

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from tvr.data_prep.records import BadSample

Source = bytes | str | PathLike[str]
Span = tuple[float, float | None]
"""[start, end) in seconds from the first frame of a video; None: to its end."""


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
    the span. F is `num_frames`, or less where there are fewer: then every frame there is. All
    frames are decoded in order and counted, since seeking by time gives wrong pictures around
    B-frames; only the chosen ones are converted to RGB and kept.

    Raises:
        BadSample: "unreadable" (damaged, truncated, unknown format) or "no_frames" (in the span).
        ValueError: a span or offsets out of range.
    """
    check_span(span)

    def choose(times_s: Sequence[float]) -> list[int]:
        first, end = frames_within(times_s, span)
        return [first + i for i in segment_frames(end - first, num_frames, offsets)]

    promised = _promised_times(source, key)
    chosen = choose(promised)
    pictures, times_s = _pick(source, set(chosen), key)
    if times_s != promised:
        # Field-coded pictures have two packets a frame, and leading ones may be undecodable: what
        # the decoder gave is the truth, known only now.
        chosen = choose(times_s)
        pictures, times_s = _pick(source, set(chosen), key)
    if not chosen:
        raise BadSample(key, "no_frames", _no_picture(span))
    scaler = VideoReformatter()  # a new one for each frame takes four times as long
    frames = [_upright(pictures[index], scaler) for index in chosen]
    if len({frame.shape for frame in frames}) > 1:
        raise BadSample(key, "unreadable", "the picture size changes within the video")
    first, _ = frames_within(times_s, span)
    return np.stack(frames), tuple(round(times_s[i] - times_s[first], 6) for i in chosen)


def describe_video(source: Source, *, key: str = "video") -> VideoInfo:
    """Reads the container's packets without decoding them. Raises BadSample as `sample_frames`
    does."""
    with _opened(source, key) as (container, stream):
        num_shown = len(_shown_packets(container, stream, key))
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        return VideoInfo(
            container=container.format.name,
            num_frames=num_shown,
            width=stream.width,
            height=stream.height,
            frame_rate_hz=rate,
            duration_s=_duration_s(container, stream) or (num_shown / rate if rate else 0.0),
        )


def segment_frames(
    total: int, num_wanted: int, offsets: Sequence[float] | None = None
) -> list[int]:
    """One index out of each of `num_wanted` equal segments of range(total); all where fewer.

    Index i lies at the share `offsets[i]` in [0, 1) of segment i, by default at its middle. Where
    `total` is no multiple of `num_wanted`, segments share a frame, and both may name it.
    """
    if num_wanted < 1:
        raise ValueError(f"num_frames={num_wanted} must be at least 1")
    shares = np.full(num_wanted, 0.5) if offsets is None else np.asarray(offsets, dtype=np.float64)
    if shares.shape != (num_wanted,) or not ((shares >= 0) & (shares < 1)).all():
        raise ValueError(f"offsets={offsets} must be {num_wanted} numbers, each in [0, 1)")
    if total <= num_wanted:
        return list(range(total))
    # A share just below 1 may be rounded up to the next segment: after the last there is none.
    indices = np.floor((np.arange(num_wanted) + shares) * total / num_wanted).astype(int)
    return np.minimum(indices, total - 1).tolist()


def segment_centres(total: int, num_wanted: int) -> list[int]:
    """`segment_frames` at the middles; no two are equal."""
    return segment_frames(total, num_wanted)


def check_span(span: Span | None) -> None:
    """Raises ValueError unless 0 <= start < end."""
    if span is None:
        return
    start_s, end_s = span
    if not (0 <= start_s < (math.inf if end_s is None else end_s)):
        raise ValueError(f"span={span} must be (start_s, end_s or None) with 0 <= start < end")


def frames_within(times_s: Sequence[float], span: Span | None) -> tuple[int, int]:
    """(first, end) of the frames whose time, to the microsecond, lies in [start_s, end_s)."""
    start_s, end_s = _bounds(span)
    return bisect_left(times_s, start_s), bisect_left(times_s, end_s)


def reencode_video(
    source: Source,
    *,
    short_side: int | None,
    keyframe_interval: int,
    span: Span | None = None,
    key: str = "video",
) -> bytes:
    """H.264 MP4 bytes of every frame of the video, or of a span of it, upright, without sound,
    sides rounded to even pixels. The first frame is a keyframe shown at 0 s.

    The same input gives the same bytes: one encoder thread, no dates. Raises as `sample_frames`
    does.
    """
    check_span(span)
    buffer = io.BytesIO()
    with (
        _opened(source, key) as (container, stream),
        av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as output,
    ):
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        encoder = output.add_stream("libx264", rate=rate)
        encoder.pix_fmt = "yuv420p"
        # cpu-independent: libx264 165's AVX-512 code gave other bytes on every run.
        encoder.options = {
            "crf": "20",
            "g": str(keyframe_interval),
            "preset": "fast",
            "x264-params": "cpu-independent=1",
        }
        encoder.codec_context.thread_count = 1
        encoder.codec_context.time_base = stream.time_base or 1 / rate
        scaler = VideoReformatter()
        num_frames = start_pts = 0
        for frame in _frames_within(_frames(container, stream, key), span):
            picture = _even(frame, short_side, scaler)
            picture.pict_type = PictureType.NONE  # else the source's I, P and B types are forced
            if num_frames == 0:
                start_pts = picture.pts
                encoder.width, encoder.height = picture.width, picture.height
            elif (picture.width, picture.height) != (encoder.width, encoder.height):
                raise BadSample(key, "unreadable", "the picture size changes within the video")
            if picture.pts is not None and start_pts is not None:
                picture.pts -= start_pts
            output.mux(encoder.encode(picture))
            num_frames += 1
        if num_frames == 0:
            raise BadSample(key, "no_frames", _no_picture(span))
        output.mux(encoder.encode(None))
    return buffer.getvalue()


def short_side_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) of the same shape whose shorter side is `short_side` pixels."""
    shorter = min(width, height)
    return max(1, round(width * short_side / shorter)), max(1, round(height * short_side / shorter))


@contextmanager
def _opened(source: Source, key: str) -> Iterator[tuple[InputContainer, VideoStream]]:
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


def _shown_packets(container: InputContainer, stream: VideoStream, key: str) -> list[int | None]:
    """Presentation time stamps, in file order, of the packets that are shown; refuses a file that
    lacks some."""
    shown = []
    num_packets = 0
    for packet in container.demux(stream):
        if packet.size:
            num_packets += 1
            if not packet.is_discard:
                shown.append(packet.pts)
        if packet.is_corrupt:
            raise BadSample(key, "unreadable", f"packet {num_packets} is truncated or damaged")
    # An MP4 index lists every packet before one is read; a file cut between two packets just ends
    # early.
    promised = len(stream.index_entries)
    if num_packets < promised:
        raise BadSample(
            key, "unreadable", f"truncated: {num_packets} of {promised} packets are there"
        )
    if not shown:
        raise BadSample(key, "no_frames", "the video stream has no packets")
    return shown


def _promised_times(source: Source, key: str) -> list[float]:
    """When frames are shown, in order, counted from the first one, as the packets have it."""
    with _opened(source, key) as (container, stream):
        shown = _shown_packets(container, stream, key)
        stamps = [pts for pts in shown if pts is not None]
        clock = _Clock(stream)
        if len(stamps) < len(shown):
            return [clock.second(None, index) for index in range(len(shown))]
        return [clock.second(pts, index) for index, pts in enumerate(sorted(stamps))]


def _pick(source: Source, wanted: set[int], key: str) -> tuple[dict[int, VideoFrame], list[float]]:
    """The wanted frames by index, and the times of all frames really decoded."""
    pictures = {}
    times_s = []
    with _opened(source, key) as (container, stream):
        for index, (frame, time_s) in enumerate(_frames(container, stream, key)):
            times_s.append(time_s)
            if index in wanted:
                pictures[index] = frame
    return pictures, times_s


class _Clock:
    """Seconds since the first frame: many containers do not start at 0."""

    def __init__(self, stream: VideoStream) -> None:
        self._unit_s = stream.time_base
        # Raw streams carry no time stamps; their rate is all there is.
        self._rate_hz = float(stream.average_rate or stream.guessed_rate or 25)
        self._start: int | None = None

    def second(self, pts: int | None, index: int) -> float:
        """Of frame `index`, to the microsecond; to be asked in order."""
        if pts is None or self._unit_s is None:
            return round(index / self._rate_hz, 6)
        if self._start is None:
            self._start = pts
        return round(float((pts - self._start) * self._unit_s), 6)


def _frames(
    container: InputContainer, stream: VideoStream, key: str
) -> Iterator[tuple[VideoFrame, float]]:
    """Frames in presentation order and their times. A damaged one is refused: libav fills the hole
    with invented pixels."""
    clock = _Clock(stream)
    for index, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise BadSample(key, "unreadable", f"frame {index} is damaged")
        yield frame, clock.second(frame.pts, index)


def _frames_within(
    frames: Iterator[tuple[VideoFrame, float]], span: Span | None
) -> Iterator[VideoFrame]:
    start_s, end_s = _bounds(span)
    for frame, time_s in frames:
        if time_s >= end_s:
            return
        if time_s >= start_s:
            yield frame


def _bounds(span: Span | None) -> tuple[float, float]:
    """As rounded as frame times are."""
    start_s, end_s = span or (0.0, None)
    return round(start_s, 6), math.inf if end_s is None else round(end_s, 6)


def _no_picture(span: Span | None) -> str:
    where = "" if span is None else f" from {span[0]} s to {_bounds(span)[1]} s"
    return f"the decoder gave no picture{where}"


def _upright(frame: VideoFrame, scaler: VideoReformatter) -> np.ndarray:
    """RGB (H, W, 3) with the container's rotation (counter-clockwise degrees) applied."""
    picture = scaler.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.rot90(picture, k=round(frame.rotation / 90) % 4)


def _even(frame: VideoFrame, short_side: int | None, scaler: VideoReformatter) -> VideoFrame:
    """The frame upright, at the wanted size, with even sides, which 4:2:0 colour demands."""
    picture = frame
    if frame.rotation:
        picture = VideoFrame.from_ndarray(
            np.ascontiguousarray(_upright(frame, scaler)), format="rgb24"
        )
        picture.pts, picture.time_base = frame.pts, frame.time_base
    width, height = picture.width, picture.height
    if short_side is not None:
        width, height = short_side_size(width, height, short_side)
    width, height = max(2, width - width % 2), max(2, height - height % 2)
    return scaler.reformat(
        picture, width, height, format="yuv420p", interpolation="BICUBIC", threads=1
    )


def _duration_s(container: InputContainer, stream: VideoStream) -> float:
    if stream.duration is not None and stream.time_base is not None:
        return round(float(stream.duration * stream.time_base), 6)
    return round(container.duration / av.time_base, 6) if container.duration else 0.0
