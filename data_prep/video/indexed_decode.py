"""Decodes single frames of a video whose frame index is known and was checked against a decode.

Compared with `frame_index.decode_frames`, which looks at every frame from a keyframe on:

- A decode ends with the packet of the frame it is for. Decoders return frames late, because later
  packets may hold earlier frames; here the decoder is drained instead.
- H.264 marks pictures that no other picture refers to (nal_ref_idc 0, half of the pictures of usual
  encodings). Those that are not wanted are not decoded.

Both leave the pixels of the wanted frames as they are. Damage of the frames between is not noticed,
so this is for the videos of data sets, whose bytes are checked and were decoded when packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from tvr.data_prep.video.frame_index import (
    FrameIndex,
    FrameIndexMismatch,
    Source,
    keyframe_before,
    open_video,
)

# In other codecs a picture that is marked so may still be a reference, such as in HEVC of pictures
# in a higher temporal layer.
SKIPPING = ("h264",)


class _Run(NamedTuple):
    """Frames that are decoded from one keyframe on."""

    start: int
    wanted: list[int]


def decode_indexed(
    source: Source,
    index: FrameIndex,
    wanted: Sequence[int],
    key: str,
    on_open: Callable[[InputContainer, VideoStream], object] = lambda container, stream: None,
) -> Iterator[tuple[int, VideoFrame]]:
    """Yields the wanted frames, each with its index.

    Args:
        index: Index with time stamps.
        wanted: Frame indices in ascending order.
        on_open: Called before the first frame is decoded.

    Raises:
        FrameIndexMismatch: the video's packets or frames differ from the index.
        BadSample: the video cannot be decoded.
    """
    if index.pts is None:
        raise FrameIndexMismatch("an index without time stamps")
    with open_video(source, key) as (container, stream):
        if stream.index != index.stream:
            raise FrameIndexMismatch(f"stream {stream.index} is not {index.stream}")
        on_open(container, stream)
        for number, run in enumerate(_runs(index, wanted)):
            if number or run.start:
                container.seek(index.pts[run.start], stream=stream)
            yield from _decode_run(container, stream, index.pts, run)


def _runs(index: FrameIndex, wanted: Sequence[int]) -> list[_Run]:
    runs: list[_Run] = []
    for frame in wanted:
        start = keyframe_before(index, frame)
        if not runs or start > runs[-1].wanted[-1]:
            runs.append(_Run(start, []))
        runs[-1].wanted.append(frame)
    return runs


def _decode_run(
    container: InputContainer, stream: VideoStream, pts: tuple[int, ...], run: _Run
) -> Iterator[tuple[int, VideoFrame]]:
    missing = {pts[frame]: frame for frame in run.wanted}
    first, last = pts[run.start], None
    for frame in _frames(container, stream, set(missing), first):
        if frame.pts is None:
            raise FrameIndexMismatch("a frame without a time stamp")
        if frame.pts < first:
            continue  # frames presented before a keyframe may refer to skipped frames
        if frame.is_corrupt:
            raise FrameIndexMismatch("a frame is damaged")
        # A decode that starts late would give wrong pictures.
        if (frame.pts != first) if last is None else (frame.pts <= last):
            raise FrameIndexMismatch(f"time stamp {frame.pts} after {last}, from {first} on")
        last = frame.pts
        if frame.pts in missing:
            yield missing.pop(frame.pts), frame
    if missing:
        raise FrameIndexMismatch(f"frames {list(missing.values())} are missing")


def _frames(
    container: InputContainer, stream: VideoStream, wanted: set[int], first: int
) -> Iterator[VideoFrame]:
    """Yields the frames of the packets up to the last wanted one.

    Args:
        wanted: Time stamps of the frames.
        first: Time stamp of the frame at which the decode starts.
    """
    context = stream.codec_context
    skips = context.name in SKIPPING
    kept, to_send = wanted | {first}, set(wanted)
    for packet in container.demux(stream):
        if not packet.size:
            break  # the end of the file
        if skips:
            context.skip_frame = "DEFAULT" if packet.pts in kept else "NONREF"
        yield from context.decode(packet)
        if packet.pts is not None:
            to_send.discard(packet.pts)
        if not to_send:
            break
    yield from context.decode(None)
