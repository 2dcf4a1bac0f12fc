"""Samples the same frames as `decode.sample_frames`, with torchcodec.

torchcodec uses the system's FFmpeg libraries; PyAV brings its own. Only version 0.13.0 is known to
load with this project's torch: later wheels are built against CUDA.

torchcodec turns pictures by the angle of the container's matrix and knows no other rule of
`picture`. Mirrored pictures and pixels that are not square are put right afterwards. A video whose
colours, fields or orientation need each frame's own data is left to PyAV, with one warning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torchcodec import FrameBatch
from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

from tvr.data_prep.records import BadSample
from tvr.data_prep.video import decode
from tvr.data_prep.video.frame_index import SEEKABLE, FrameIndex, Source, index_packets
from tvr.data_prep.video.frame_sampling import FrameSpacing, Span, check_span
from tvr.data_prep.video.images import resize
from tvr.data_prep.video.orientation import QUARTER_TURNS, display_matrices
from tvr.data_prep.video.parameter_sets import changes_pictures
from tvr.data_prep.video.picture import (
    SPECIFIED,
    PicturePainter,
    untagged_matrix,
    warn_once,
)
from tvr.data_prep.video.tone_map import HDR_TRANSFERS

FULL_RANGE = 2
PICTURES_BYTES = 1 << 25


def sample_frames(
    source: Source,
    num_frames: int,
    *,
    span: Span | None = None,
    offsets: Sequence[float] | None = None,
    key: str = "video",
    frame_index: FrameIndex | None = None,
    finish: decode.Finish | None = None,
    spacing: FrameSpacing = "time",
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Samples frames as `decode.sample_frames`, from MP4 and similar containers.

    Damaged pictures are not detected. Use it only for videos that were checked before, such as
    those of a data set.

    Args:
        frame_index: Index that was stored with the video, for a video that is left to PyAV. For
            others the packets are read anyway: they say what torchcodec does not show.
        finish: As for `decode.sample_frames`; so many pictures as fit PICTURES_BYTES are held
            before it.

    Raises:
        BadSample: as `decode.sample_frames`; "unreadable" also if torchcodec's frames differ from
            the container's index.
        ValueError: a span or offsets are out of range.
    """
    check_span(span)
    pictures = _Pictures(key)
    packets = index_packets(source, key, pictures.read)
    try:
        if not pictures.has_exact_index:
            raise _OnlyPyAV("a container without an exact index")
        if not packets.is_certain or packets.stamps is not None:
            raise _OnlyPyAV("time stamps that must be mended")
        chosen, times_s = decode.choose_frames(packets, num_frames, span, offsets, key, spacing)
        wanted = sorted(set(chosen))
        frames = _decode(source, packets, wanted, pictures, key, finish)
    except _OnlyPyAV as reason:
        warn_once(str(reason), f"torchcodec leaves videos to PyAV, for example {key}: {reason}")
        return decode.sample_frames(
            source,
            num_frames,
            span=span,
            offsets=offsets,
            key=key,
            frame_index=frame_index,
            finish=finish,
            spacing=spacing,
        )
    return frames[np.searchsorted(wanted, chosen)], times_s


class _OnlyPyAV(Exception):
    """torchcodec would show the video otherwise than a player."""


def _decode(
    source: Source,
    frame_index: FrameIndex,
    wanted: list[int],
    pictures: _Pictures,
    key: str,
    finish: decode.Finish | None,
) -> np.ndarray:
    assert frame_index.pts is not None
    try:
        # One thread, as for PyAV. By default torchcodec reads the whole index and seeks exactly.
        decoder = VideoDecoder(
            source if isinstance(source, bytes) else str(source),
            stream_index=frame_index.stream,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
        )
        angle = decoder.metadata.rotation
        frame, painter = pictures.first, pictures.painter
        if frame is None:
            frame, painter = decode.first_frame(source, key)
        if pictures.change:
            raise _OnlyPyAV("pictures of several sizes, shapes, colours or orientations")
        _check_frame(frame, has_container_matrix=angle is not None)
        if len(decoder) != frame_index.num_frames:
            raise _OnlyPyAV("a list of frames that differs from the container's")
        # Half a turn is 2 or -2 quarters, rounded as torchcodec does: halves away from zero.
        turns = int(math.copysign(math.floor(abs(angle or 0) / 90 + 0.5), angle or 0)) % 4
        at_once = len(wanted)
        if finish is not None:
            at_once = max(1, PICTURES_BYTES // (3 * frame.width * frame.height))
        parts = []
        for start in range(0, len(wanted), at_once):
            part = wanted[start : start + at_once]
            batch = _frames_at(decoder, part)
            expected_s = [float(frame_index.pts[index] * frame_index.unit_s) for index in part]
            if not np.allclose(batch.pts_seconds.numpy(), expected_s, 0, 1e-6):
                raise _OnlyPyAV("frames of other times than requested")
            shown = _reshape(batch.data.numpy(), frame, turns, painter)
            parts.append(shown if finish is None else np.stack([finish(each) for each in shown]))
    except (RuntimeError, ValueError, IndexError) as error:
        raise BadSample(key, "unreadable", f"torchcodec: {str(error).splitlines()[0]}") from error
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _frames_at(decoder: VideoDecoder, wanted: list[int]) -> FrameBatch:
    try:
        return decoder.get_frames_at(wanted)
    except RuntimeError as error:  # such as after a seek to a mark where no decode can start
        raise _OnlyPyAV("frames that torchcodec does not find") from error


class _Pictures:
    """Looks at the packets of a video for what torchcodec does not show."""

    def __init__(self, key: str) -> None:
        self.painter = PicturePainter(key)
        self.first: VideoFrame | None = None
        """The first keyframe that is shown; None if an edit list hides all of them."""
        self.has_exact_index = False
        self.change = False
        """A later keyframe announces pictures of another kind."""

    def read(self, container: InputContainer, stream: VideoStream, packet: Packet) -> None:
        """Decodes the first keyframe, and reads the others' packets for changes."""
        self.has_exact_index = bool(SEEKABLE & set(container.format.name.split(",")))
        if not packet.is_keyframe:
            return
        context = stream.codec_context
        if self.first is None:
            self.painter.open(container, stream)
            frames = [*stream.decode(packet), *stream.decode(None)]
            context.flush_buffers()
            if frames:
                self.first = frames[0]
                self.painter.see(self.first)
        self.change = self.change or changes_pictures(packet, context)


def _check_frame(frame: VideoFrame, *, has_container_matrix: bool) -> None:
    """Raises _OnlyPyAV unless torchcodec shows such frames as `picture` does."""
    if frame.interlaced_frame:
        raise _OnlyPyAV("interlaced pictures")
    if frame.color_trc in HDR_TRANSFERS:
        raise _OnlyPyAV(f"pictures in {HDR_TRANSFERS[frame.color_trc].upper()}")
    if len(display_matrices(frame)) > has_container_matrix:
        raise _OnlyPyAV("an orientation in the video stream")
    if frame.format.is_rgb or frame.format.has_palette:
        return
    is_full_format = frame.format.name.startswith("yuvj")
    if frame.color_range == FULL_RANGE and not is_full_format:
        raise _OnlyPyAV("colours of full range")
    if frame.colorspace not in SPECIFIED:
        # The matrix that libav takes for pictures of any size.
        if untagged_matrix(frame.width, frame.height) != untagged_matrix(1, 1):
            raise _OnlyPyAV("large pictures without a tag of their colours")


def _reshape(
    frames: np.ndarray, frame: VideoFrame, turns: int, painter: PicturePainter
) -> np.ndarray:
    """Applies what torchcodec does not: mirroring, and the shape of pixels."""
    if painter.pixel_shape == 1 and painter.orientation == QUARTER_TURNS[turns]:
        return frames
    stored = np.rot90(frames, k=-turns, axes=(1, 2))
    if painter.pixel_shape != 1:
        stored = resize(stored, *painter.square_size(frame))
    return np.ascontiguousarray(painter.orientation.apply(stored))
