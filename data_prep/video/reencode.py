"""Videos as H.264 with frequent keyframes, whole or cut, with PyAV."""

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
from tvr.data_prep.video.frame_index import FrameIndex, Source, decoded_frames, with_timeline
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
    """H.264 MP4 bytes of every frame of the video, or of a span of it, upright, without sound,
    sides rounded to even pixels. The first frame is a keyframe shown at 0 s.

    The same input gives the same bytes: one encoder thread, no dates. Raises as `sample_frames`
    does.
    """
    check_span(span)

    def encode(timeline: FrameIndex) -> bytes:
        wanted = timeline.within(span, key)
        frames = decoded_frames(source, timeline, wanted, key)
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
            encoder = _add_encoder(output, timeline, keyframe_interval)
            scaler = VideoReformatter()
            for index, frame in frames:
                picture = _even(frame, short_side, scaler)
                picture.pict_type = PictureType.NONE  # else the source's I, P, B types are forced
                picture.pts = timeline.ticks(index) - timeline.ticks(wanted[0])
                picture.time_base = timeline.unit_s
                if index == wanted[0]:
                    encoder.width, encoder.height = picture.width, picture.height
                elif (picture.width, picture.height) != (encoder.width, encoder.height):
                    raise BadSample(key, "unreadable", "the picture size changes within the video")
                output.mux(encoder.encode(picture))
            output.mux(encoder.encode(None))
        return buffer.getvalue()

    return with_timeline(source, key, encode)


def _add_encoder(
    output: OutputContainer, timeline: FrameIndex, keyframe_interval: int
) -> VideoStream:
    encoder = output.add_stream("libx264", rate=timeline.rate_hz)
    encoder.pix_fmt = "yuv420p"
    # cpu-independent: libx264 165's AVX-512 code gave other bytes on every run.
    encoder.options = {
        "crf": "20",
        "g": str(keyframe_interval),
        "preset": "fast",
        "x264-params": "cpu-independent=1",
    }
    encoder.codec_context.thread_count = 1
    encoder.codec_context.time_base = timeline.unit_s
    return encoder


def _even(frame: VideoFrame, short_side: int | None, scaler: VideoReformatter) -> VideoFrame:
    """The frame upright, at the wanted size, with even sides, which 4:2:0 colour demands."""
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
