"""Samples the same frames as `decode.sample_frames`, with torchcodec.

torchcodec uses the system's FFmpeg libraries; PyAV brings its own. Only version 0.13.0 is known to
load with this project's torch: later wheels are built against CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

from tvr.data_prep.records import BadSample
from tvr.data_prep.video.decode import choose_frames
from tvr.data_prep.video.frame_index import FrameIndex, FrameIndexMismatch, Source, index_packets
from tvr.data_prep.video.frame_sampling import Span, check_span


def sample_frames(
    source: Source,
    num_frames: int,
    *,
    span: Span | None = None,
    offsets: Sequence[float] | None = None,
    key: str = "video",
    frame_index: FrameIndex | None = None,
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Samples frames as `decode.sample_frames`, from MP4 and similar containers.

    Damaged pictures are not detected. Use it only for videos that were checked before, such as
    those of a data set.

    Raises:
        BadSample: as `decode.sample_frames`; "unreadable" also if torchcodec's frames differ from
            the container's index.
        ValueError: a span or offsets are out of range.
    """
    check_span(span)

    def sample(index: FrameIndex) -> tuple[np.ndarray, tuple[float, ...]]:
        chosen, times_s = choose_frames(index, num_frames, span, offsets, key)
        wanted = sorted(set(chosen))
        frames = _decode(source, index, wanted, key)
        return frames[np.searchsorted(wanted, chosen)], times_s

    if frame_index is not None:
        try:
            return sample(frame_index)
        except FrameIndexMismatch:
            pass
    try:
        return sample(index_packets(source, key))
    except FrameIndexMismatch as error:
        raise BadSample(key, "unreadable", str(error)) from error


def _decode(source: Source, frame_index: FrameIndex, wanted: list[int], key: str) -> np.ndarray:
    if frame_index.pts is None:
        raise BadSample(key, "unreadable", "torchcodec needs time stamps, and the video has none")
    try:
        # One thread, as for PyAV. By default torchcodec reads the whole index and seeks exactly.
        decoder = VideoDecoder(
            source if isinstance(source, bytes) else str(source),
            stream_index=frame_index.stream,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
        )
        batch = decoder.get_frames_at(wanted)
    except IndexError as error:  # the index has more frames
        raise FrameIndexMismatch(f"torchcodec: {error}") from error
    except (RuntimeError, ValueError) as error:
        raise BadSample(key, "unreadable", f"torchcodec: {str(error).splitlines()[0]}") from error
    expected_s = [float(frame_index.pts[index] * frame_index.unit_s) for index in wanted]
    returned_s = batch.pts_seconds.numpy()
    if len(decoder) != frame_index.num_frames or not np.allclose(returned_s, expected_s, 0, 1e-6):
        raise FrameIndexMismatch("torchcodec returned frames of other times than requested")
    return batch.data.numpy()
