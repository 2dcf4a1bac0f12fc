"""Re-encodes videos, or cuts of them, as H.264 with frequent keyframes, with PyAV."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import av.error
import numpy as np
from av.container import OutputContainer
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream

from tvr.data_prep.records import BadSample
from tvr.data_prep.video.decode import shown_frames
from tvr.data_prep.video.frame_index import FrameIndex, Source, SourceIndices
from tvr.data_prep.video.frame_sampling import Span, check_span
from tvr.data_prep.video.images import short_side_size
from tvr.data_prep.video.orientation import UPRIGHT
from tvr.data_prep.video.picture import (
    PicturePainter,
    color_matrix,
    fit_picture,
    untagged_matrix,
)
from tvr.data_prep.video.tone_map import HDR_TRANSFERS

# AVColorSpace of each matrix; swscale calls BT.601 by its older name.
MATRIX_TAGS = {
    Colorspace.ITU709: 1,
    Colorspace.FCC: 4,
    Colorspace.ITU601: 6,
    Colorspace.SMPTE240M: 7,
    Colorspace.BT2020: 9,
}
BT709_TAG, LIMITED_RANGE = 1, 1


def reencode_video(
    source: Source,
    *,
    short_side: int | None,
    keyframe_interval: int,
    span: Span | None = None,
    key: str = "video",
    adjusted: set[str] | None = None,
    indices: SourceIndices | None = None,
) -> bytes:
    """Re-encodes a video, or a span of it, as H.264 MP4.

    The result holds every frame as a player shows it, see `picture`: upright, with square pixels,
    progressive, in standard range. Both sides are rounded down to even pixels. It has no sound, and
    its tags name its colours, so that nothing is applied twice. The first frame is a keyframe at
    0 s. The same input gives the same bytes: one encoder thread, no dates.

    Args:
        short_side: Pixels of the shorter side; None keeps the size.
        keyframe_interval: Frames between keyframes.
        adjusted: Receives the names in ADJUSTMENTS of what the pictures needed.
        indices: Indices of the source, for a source of which several spans are encoded.

    Returns:
        The bytes of the MP4 file.

    Raises as `sample_frames`.
    """
    check_span(span)

    def encode(frame_index: FrameIndex) -> bytes:
        wanted = frame_index.within(span, key)
        painter = PicturePainter(key)
        frames = shown_frames(source, frame_index, wanted, key, painter)
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
            encoder = _add_encoder(output, frame_index, keyframe_interval)
            pictures = _EncoderPictures(painter, encoder, short_side)
            for index, frame in frames:
                ticks = frame_index.ticks(index) - frame_index.ticks(wanted[0])
                picture = pictures.make(frame)
                picture.pts, picture.time_base = ticks, frame_index.unit_s
                output.mux(encoder.encode(picture))
            output.mux(encoder.encode(None))
        if adjusted is not None:
            adjusted.update(painter.adjusted)
        return buffer.getvalue()

    try:
        return (indices or SourceIndices(source)).apply(encode, key)
    except av.error.FFmpegError as error:  # the encoder's; the decoder's are bad samples already
        detail = f"it cannot be re-encoded: {error.strerror} ({type(error).__name__})"
        raise BadSample(key, "unreadable", detail) from error


def _add_encoder(
    output: OutputContainer, frame_index: FrameIndex, keyframe_interval: int
) -> VideoStream:
    encoder = output.add_stream("libx264", rate=frame_index.rate_hz)
    encoder.pix_fmt = "yuv420p"
    # cpu-independent: the AVX-512 code of libx264 165 gave different bytes on every run.
    encoder.options = {
        "crf": "20",
        "g": str(keyframe_interval),
        "preset": "fast",
        # Reads are many, writes one: no CABAC and no deblocking filter, see the README's table.
        "tune": "fastdecode",
        "x264-params": "cpu-independent=1",
    }
    encoder.codec_context.thread_count = 1
    encoder.codec_context.time_base = frame_index.unit_s
    return encoder


class _EncoderPictures:
    """Makes the encoder's pictures, all of the size and colours of the first."""

    def __init__(
        self, painter: PicturePainter, encoder: VideoStream, short_side: int | None
    ) -> None:
        self._painter = painter
        self._encoder = encoder
        self._short_side = short_side
        self._matrix: Colorspace | None = None
        self._first = (0, 0)

    def make(self, frame: VideoFrame) -> VideoFrame:
        """Returns the frame that the painter has seen last, ready for the encoder."""
        painter, encoder = self._painter, self._encoder
        shown, matrix = self._shown(frame)
        if self._matrix is None:
            self._start(frame, shown, matrix)
            self._first = shown
        elif shown != self._first:
            painter.adjusted.add("size_change")
        has_same_aspect = Fraction(*shown) == Fraction(*self._first)
        size = (encoder.width, encoder.height)
        if matrix is not None and has_same_aspect:
            painter.note(frame)
            source = painter.progressive(frame)
        else:  # turned, tone-mapped, or between bars: by way of RGB
            picture = painter.picture(frame)
            if not has_same_aspect:
                picture = fit_picture(picture, *size)
            source = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        result = painter.reformat(source, size, "yuv420p", to=self._matrix)
        result.pict_type = PictureType.NONE  # otherwise x264 keeps the source's I, P, B types
        return result

    def _shown(self, frame: VideoFrame) -> tuple[tuple[int, int], Colorspace | None]:
        """Returns the shown (width, height), and the frame's matrix if no way by RGB is needed."""
        width, height = self._painter.square_size(frame)
        orientation = self._painter.orientation
        if orientation.is_transposed:
            width, height = height, width
        is_direct = orientation == UPRIGHT and frame.color_trc not in HDR_TRANSFERS
        return (width, height), color_matrix(frame) if is_direct else None

    def _start(self, frame: VideoFrame, shown: tuple[int, int], matrix: Colorspace | None) -> None:
        """Sets the encoder's size and colours, with even sides as 4:2:0 colour requires."""
        width, height = shown
        if self._short_side is not None:
            width, height = short_side_size(width, height, self._short_side)
        encoder = self._encoder
        encoder.width, encoder.height = max(2, width - width % 2), max(2, height - height % 2)
        self._matrix = matrix or untagged_matrix(encoder.width, encoder.height)
        context = encoder.codec_context
        context.colorspace, context.color_range = MATRIX_TAGS[self._matrix], LIMITED_RANGE
        if frame.color_trc in HDR_TRANSFERS:
            context.color_trc = context.color_primaries = BT709_TAG
        else:
            context.color_trc, context.color_primaries = frame.color_trc, frame.color_primaries
