"""Re-encodes videos, or cuts of them, as H.264 with frequent keyframes, with PyAV."""

from __future__ import annotations

import io

import av
import numpy as np
from av.container import OutputContainer
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from tvr.data_prep.records import BadSample
from tvr.data_prep.video.decode import upright
from tvr.data_prep.video.frame_index import FrameIndex, Source, decode_frames, with_frame_index
from tvr.data_prep.video.frame_sampling import Span, check_span
from tvr.data_prep.video.images import short_side_size


def reencode_video(
    source: Source,
    *,
    short_side: int | None,
    keyframe_interval: int,
    span: Span | None = None,
    key: str = "video",
) -> bytes:
    """Re-encodes a video, or a span of it, as H.264 MP4.

    The result holds every frame, upright, without sound, with both sides rounded down to even
    pixels. The first frame is a keyframe at 0 s. The same input gives the same bytes: one encoder
    thread, no dates.

    Args:
        short_side: Pixels of the shorter side; None keeps the size.
        keyframe_interval: Frames between keyframes.

    Returns:
        The bytes of the MP4 file.

    Raises as `sample_frames`.
    """
    check_span(span)

    def encode(frame_index: FrameIndex) -> bytes:
        wanted = frame_index.within(span, key)
        frames = decode_frames(source, frame_index, wanted, key)
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
            encoder = _add_encoder(output, frame_index, keyframe_interval)
            scaler = VideoReformatter()
            for index, frame in frames:
                picture = _scale_even(frame, short_side, scaler)
                picture.pict_type = (
                    PictureType.NONE
                )  # otherwise x264 keeps the source's I, P, B types
                picture.pts = frame_index.ticks(index) - frame_index.ticks(wanted[0])
                picture.time_base = frame_index.unit_s
                if index == wanted[0]:
                    encoder.width, encoder.height = picture.width, picture.height
                elif (picture.width, picture.height) != (encoder.width, encoder.height):
                    raise BadSample(key, "unreadable", "the picture size changes within the video")
                output.mux(encoder.encode(picture))
            output.mux(encoder.encode(None))
        return buffer.getvalue()

    return with_frame_index(source, key, encode)


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
        "x264-params": "cpu-independent=1",
    }
    encoder.codec_context.thread_count = 1
    encoder.codec_context.time_base = frame_index.unit_s
    return encoder


def _scale_even(frame: VideoFrame, short_side: int | None, scaler: VideoReformatter) -> VideoFrame:
    """Returns the frame upright, at the wanted size, with even sides as 4:2:0 colour requires."""
    picture = frame
    if frame.rotation:
        picture = VideoFrame.from_ndarray(
            np.ascontiguousarray(upright(frame, scaler)), format="rgb24"
        )
        picture.pts, picture.time_base = frame.pts, frame.time_base
    width, height = picture.width, picture.height
    if short_side is not None:
        width, height = short_side_size(width, height, short_side)
    width, height = max(2, width - width % 2), max(2, height - height % 2)
    return scaler.reformat(
        picture, width, height, format="yuv420p", interpolation="BICUBIC", threads=1
    )
