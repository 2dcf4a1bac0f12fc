"""Selects the library that decodes videos: `data.decoder`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

# The settings name a decoder, and are read where none is installed: both are imported when used.
if TYPE_CHECKING:
    from tvr.data_prep.video.decode import Finish
    from tvr.data_prep.video.frame_index import FrameIndex, Source
    from tvr.data_prep.video.frame_sampling import FrameSpacing, Span

Decoder = Literal["pyav", "torchcodec"]


class FrameSampler(Protocol):
    """Signature of `decode.sample_frames` and its equivalents."""

    def __call__(
        self,
        source: Source,
        num_frames: int,
        *,
        span: Span | None = None,
        offsets: Sequence[float] | None = None,
        key: str = "video",
        frame_index: FrameIndex | None = None,
        finish: Finish | None = None,
        spacing: FrameSpacing = "time",
    ) -> tuple[np.ndarray, tuple[float, ...]]: ...


def describe_decoder(decoder: Decoder) -> str:
    """Returns a line with the decoder and its version, or the reason why it cannot be used."""
    try:
        frame_sampler(decoder)
    except ValueError as error:
        return f"videos: cannot be decoded: {error}"
    if decoder == "pyav":
        import av

        return f"videos: decoded by PyAV {av.__version__}, FFmpeg {av.ffmpeg_version_info}"
    from torchcodec import ffmpeg_major_version  # pyright: ignore[reportPrivateImportUsage]

    return f"videos: decoded by torchcodec {version('torchcodec')}, FFmpeg {ffmpeg_major_version}"


def frame_sampler(decoder: Decoder) -> FrameSampler:
    """Returns the function that samples frames with a decoder.

    Raises:
        ValueError: the decoder is unknown, or torchcodec cannot be loaded.
    """
    if decoder == "pyav":
        from tvr.data_prep.video import decode

        return decode.sample_frames
    if decoder != "torchcodec":
        raise ValueError(f"decoder={decoder!r} must be pyav or torchcodec")
    try:
        from tvr.data_prep.video.decode_torchcodec import sample_frames
    except (ImportError, RuntimeError) as error:  # RuntimeError: FFmpeg is missing
        raise ValueError(
            "decoder=torchcodec (data.decoder) needs pip install 'tvr[torchcodec]' and the shared"
            f" libraries of FFmpeg 4 to 8 (apt-get install ffmpeg): {str(error).splitlines()[0]}"
        ) from error
    return sample_frames
