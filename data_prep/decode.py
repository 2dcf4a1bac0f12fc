"""Exact frame sampling from video files with PyAV."""

from __future__ import annotations

import io
from collections.abc import Iterator
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
    source: Source, num_frames: int, *, key: str = "video"
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Decodes the frames at the centres of `num_frames` equal segments, upright.

    Returns uint8 RGB (F, H, W, 3) and the second each is shown at. F is `num_frames`, or less where
    the video has fewer: then every frame it has. All frames are decoded in order and counted, since
    seeking by time gives wrong pictures around B-frames; only the chosen ones are converted to RGB
    and kept.

    Raises:
        BadSample: "unreadable" (damaged, truncated, unknown format) or "no_frames".
    """
    info = describe_video(source, key=key)
    chosen, total = _pick(source, info.num_frames, num_frames, info, key)
    if total != info.num_frames:
        # Field-coded pictures have two packets a frame, and leading ones may be undecodable: the
        # decoder's count is the true one, known only now.
        chosen, total = _pick(source, total, num_frames, info, key)
    if not chosen:
        raise BadSample(key, "no_frames", "the decoder gave no picture")
    scaler = VideoReformatter()  # a new one for each frame takes four times as long
    frames = [_upright(frame, scaler) for frame, _ in chosen]
    if len({frame.shape for frame in frames}) > 1:
        raise BadSample(key, "unreadable", "the picture size changes within the video")
    return np.stack(frames), tuple(time_s for _, time_s in chosen)


def describe_video(source: Source, *, key: str = "video") -> VideoInfo:
    """Reads the container's packets without decoding them. Raises BadSample as `sample_frames`
    does."""
    with _opened(source, key) as (container, stream):
        num_packets = num_shown = 0
        for packet in container.demux(stream):
            if packet.size:
                num_packets += 1
                num_shown += not packet.is_discard
            if packet.is_corrupt:
                raise BadSample(key, "unreadable", f"packet {num_packets} is truncated or damaged")
        # An MP4 index lists every packet before one is read; a file cut between two packets just
        # ends early.
        if num_packets < len(stream.index_entries):
            promised = len(stream.index_entries)
            raise BadSample(
                key, "unreadable", f"truncated: {num_packets} of {promised} packets are there"
            )
        if num_shown == 0:
            raise BadSample(key, "no_frames", "the video stream has no packets")
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        return VideoInfo(
            container=container.format.name,
            num_frames=num_shown,
            width=stream.width,
            height=stream.height,
            frame_rate_hz=rate,
            duration_s=_duration_s(container, stream) or (num_shown / rate if rate else 0.0),
        )


def segment_centres(total: int, num_wanted: int) -> list[int]:
    """Indices of the middle item of each of `num_wanted` equal segments of range(total); all where
    fewer."""
    if num_wanted < 1:
        raise ValueError(f"num_frames={num_wanted} must be at least 1")
    if total <= num_wanted:
        return list(range(total))
    return [(2 * i + 1) * total // (2 * num_wanted) for i in range(num_wanted)]


def reencode_video(
    source: Source, *, short_side: int | None, keyframe_interval: int, key: str = "video"
) -> bytes:
    """H.264 MP4 bytes of every frame of the video, upright, without sound, sides rounded to even
    pixels.

    The same input gives the same bytes: one encoder thread, no dates. Raises BadSample as
    `sample_frames` does.
    """
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
        num_frames = 0
        for frame, index in _frames(container, stream, key):
            picture = _even(frame, short_side, scaler)
            picture.pict_type = PictureType.NONE  # else the source's I, P and B types are forced
            if index == 0:
                encoder.width, encoder.height = picture.width, picture.height
            elif (picture.width, picture.height) != (encoder.width, encoder.height):
                raise BadSample(key, "unreadable", "the picture size changes within the video")
            output.mux(encoder.encode(picture))
            num_frames += 1
        if num_frames == 0:
            raise BadSample(key, "no_frames", "the decoder gave no picture")
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


def _pick(
    source: Source, total: int, num_frames: int, info: VideoInfo, key: str
) -> tuple[list[tuple[VideoFrame, float]], int]:
    """Frames at the segment centres of range(total) with their times, and the number really
    decoded."""
    wanted = set(segment_centres(total, num_frames))
    chosen = []
    count = 0
    with _opened(source, key) as (container, stream):
        for frame, index in _frames(container, stream, key):
            count += 1
            if index in wanted:
                # Raw streams carry no timestamps; their rate is all there is.
                time_s = (
                    frame.time if frame.pts is not None else index / (info.frame_rate_hz or 25.0)
                )
                chosen.append((frame, round(float(time_s), 6)))
    return chosen, count


def _frames(
    container: InputContainer, stream: VideoStream, key: str
) -> Iterator[tuple[VideoFrame, int]]:
    """Frames in presentation order. A damaged one is refused: libav fills the hole with invented
    pixels."""
    for index, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise BadSample(key, "unreadable", f"frame {index} is damaged")
        yield frame, index


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
