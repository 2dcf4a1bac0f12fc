"""The frames that `decode.sample_frames` gives, by torchcodec.

It decodes with the FFmpeg libraries of the system, PyAV with its own. Only 0.13.0 is known to load
beside this torch: later wheels are built against CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

from tvr.data_prep.records import BadSample
from tvr.data_prep.video.decode import choose
from tvr.data_prep.video.frame_index import FrameIndex, Source, packet_timeline
from tvr.data_prep.video.frame_sampling import Span, check_span


def sample_frames(
    source: Source,
    num_frames: int,
    *,
    span: Span | None = None,
    offsets: Sequence[float] | None = None,
    key: str = "video",
) -> tuple[np.ndarray, tuple[float, ...]]:
    """As `decode.sample_frames`, for MP4 and its like.

    Raises BadSample("unreadable") also where torchcodec's frames are not those of the container's
    index. A damaged picture goes unnoticed, though: this is for bytes that were checked before, as
    those of a data set are.
    """
    check_span(span)
    timeline = packet_timeline(source, key)
    chosen, times_s = choose(timeline, num_frames, span, offsets, key)
    wanted = sorted(set(chosen))
    frames = _decode(source, timeline, wanted, key)
    return frames[np.searchsorted(wanted, chosen)], times_s


def _decode(source: Source, timeline: FrameIndex, wanted: list[int], key: str) -> np.ndarray:
    if timeline.pts is None:
        raise BadSample(key, "unreadable", "torchcodec needs time stamps, and there are none")
    try:
        # One thread, as for PyAV. By default the whole index is read, and seeking is exact.
        decoder = VideoDecoder(
            source if isinstance(source, bytes) else str(source),
            stream_index=timeline.stream,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
        )
        batch = decoder.get_frames_at(wanted)
    except (RuntimeError, ValueError) as error:
        raise BadSample(key, "unreadable", f"torchcodec: {str(error).splitlines()[0]}") from error
    expected_s = [float(timeline.pts[index] * timeline.unit_s) for index in wanted]
    given_s = batch.pts_seconds.numpy()
    if len(decoder) != timeline.num_frames or not np.allclose(given_s, expected_s, 0, 1e-6):
        raise BadSample(key, "unreadable", "torchcodec gives frames of other times than asked for")
    return batch.data.numpy()
