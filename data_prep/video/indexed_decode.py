"""Decodes frames of a video by their index.

`decode_frames` is for any index: it looks at every frame from a keyframe on. `decode_indexed` is
for a frame index that is known and was checked against a decode:

- A decode ends with the packet of the frame it is for. Decoders return frames late, because later
  packets may hold earlier frames; here the decoder is drained instead.
- H.264 marks pictures that no other picture refers to (nal_ref_idc 0, half of the pictures of usual
  encodings). Those that are not wanted are not decoded.

Both leave the pixels of the wanted frames as they are. `decode_indexed` does not notice damage of
the frames between, so it is for the videos of data sets, whose bytes are checked and were decoded
when packed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import dropwhile, islice
from typing import NamedTuple

from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from tvr.data_prep.video.frame_index import (
    FrameIndex,
    FrameIndexMismatch,
    Source,
    damaged_frame,
    open_video,
)

# In other codecs a picture that is marked so may still be a reference, such as in HEVC of pictures
# in a higher temporal layer.
SKIPPING = ("h264",)


def decode_frames(
    source: Source,
    frame_index: FrameIndex,
    wanted: Iterable[int],
    key: str,
    on_open: Callable[[InputContainer, VideoStream], object] = lambda container, stream: None,
) -> Iterator[tuple[int, VideoFrame]]:
    """Yields the wanted frames, each with its index.

    Decoding seeks to a keyframe where that skips frames. Every frame's time stamp is compared with
    the index, because a seek alone gives wrong pictures around B-frames.

    Args:
        wanted: Frame indices in ascending order.
        on_open: Called before the first frame is decoded.

    Raises:
        FrameIndexMismatch: the decoder's frames differ from the index.
        BadSample: a frame is damaged.
    """
    with open_video(source, key) as (container, stream):
        on_open(container, stream)
        frames = container.decode(stream)
        decoded, has_seeked = -1, False  # index of the last decoded frame
        for index in wanted:
            start = keyframe_before(frame_index, index)
            if start > decoded + 1:
                frames = _frames_from(container, stream, frame_index, start)
                decoded, has_seeked = start - 1, True
            frame = None
            for frame in islice(frames, index - decoded):
                decoded += 1
                if frame.is_corrupt and not has_seeked:
                    raise damaged_frame(decoded, key)
                if frame.is_corrupt or not _fits(frame_index, decoded, frame):
                    raise FrameIndexMismatch(f"frame {decoded} differs")
            if frame is None or decoded < index:
                raise FrameIndexMismatch(f"frame {index} is missing")
            yield index, frame
        if frame_index.pts is None:  # only the number of frames can be compared
            for frame in frames:
                decoded += 1
                if frame.is_corrupt:
                    raise damaged_frame(decoded, key)
            count = decoded + 1
            if count != frame_index.num_frames:
                raise FrameIndexMismatch(f"{count} frames instead of {frame_index.num_frames}")


def with_keyframes(frame_index: FrameIndex, wanted: Iterable[int]) -> list[int]:
    """Returns the wanted frames, and the frames decoded before them that may say how all the
    following ones are shown: the keyframe before each, or all frames if keyframes are unknown."""
    chosen = sorted(set(wanted))
    if not frame_index.keyframes:
        return list(range(chosen[-1] + 1)) if chosen else []
    return sorted({*chosen, *(keyframe_before(frame_index, index) for index in chosen)})


def keyframe_before(frame_index: FrameIndex, index: int) -> int:
    """Returns the frame at which a decode of frame `index` starts."""
    count = bisect_right(frame_index.keyframes, index)
    return frame_index.keyframes[count - 1] if count else 0


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
    if index.pts is None or index.stamps is not None:
        raise FrameIndexMismatch("an index without reliable time stamps")
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


def _frames_from(
    container: InputContainer, stream: VideoStream, frame_index: FrameIndex, start: int
) -> Iterator[VideoFrame]:
    assert frame_index.pts is not None, "keyframes have time stamps"
    pts = frame_index.pts[start]
    container.seek(pts, stream=stream)
    # Frames presented before the keyframe may refer to skipped frames.
    return dropwhile(
        lambda frame: frame.pts is not None and frame.pts < pts, container.decode(stream)
    )


def _fits(frame_index: FrameIndex, index: int, frame: VideoFrame) -> bool:
    if index >= frame_index.num_frames:
        return False
    stamps = frame_index.stamps or frame_index.pts
    return stamps is None or frame.pts == stamps[index]
