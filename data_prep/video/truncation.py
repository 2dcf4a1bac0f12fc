"""Refuses videos that were cut short, which libav reads as if their end were the end.

What a container says is compared with what is there: the sizes of its elements, else the duration
that it states. Streams without either are judged by their last picture, which must decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from statistics import median

import av.error
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from tvr.data_prep.containers.elements import Content, CutShort, mapped
from tvr.data_prep.containers.ends import StatedEnd, stated_end
from tvr.data_prep.containers.mpeg import ends_with_part
from tvr.data_prep.records import BadSample
from tvr.data_prep.video.frame_index import Source, open_video

# Containers and bare streams that do not say how long they are.
OPEN_ENDED = {"mpegts", "mpeg", "mpegvideo", "h264", "hevc", "m4v", "obu", "av1"}
SLACK_S, SLACK_SHARE = 0.5, 0.02
"""A stated duration may exceed what is there by the larger of the two: writers round it, and count
the last frame differently."""
TAILS = (b"\x55" * 64, b"\xaa\x36" * 32)
MIN_REGULAR = 16
"""Frames of which the rate of a stream is known."""


def check_whole(source: Source, key: str) -> None:
    """Raises BadSample("unreadable") with a detail that starts with "truncated:" for a file that
    was cut short, see data_prep/README.md; otherwise as `open_video`."""
    try:
        with mapped(source) as content:
            stated = stated_end(content)
            with open_video(source, key) as (container, stream):
                names = set(container.format.name.split(","))
                if stated.duration_s is not None:
                    _check_duration(container, stated.duration_s)
                elif names & OPEN_ENDED:
                    _check_last_picture(container, stream, content, stated)
    except CutShort as error:
        raise BadSample(key, "unreadable", f"truncated: {error}") from error
    except OSError as error:
        raise BadSample(key, "missing_file", str(error)) from error


def _check_duration(container: InputContainer, stated_s: float) -> None:
    """Compares the end of the longest stream with the stated duration."""
    first_s: float | None = None
    last_s = 0.0
    for packet in container.demux():
        if packet.size and packet.pts is not None and packet.time_base is not None:
            start_s = float(packet.pts * packet.time_base)
            first_s = start_s if first_s is None else min(first_s, start_s)
            last_s = max(last_s, start_s + float((packet.duration or 0) * packet.time_base))
    if first_s is None:
        return
    missing_s = stated_s - (last_s - min(first_s, 0.0))
    if missing_s > max(SLACK_S, SLACK_SHARE * stated_s):
        raise CutShort(f"it states a duration of {stated_s:.2f} s and ends at {last_s:.2f} s")


def _check_last_picture(
    container: InputContainer, stream: VideoStream, content: Content, stated: StatedEnd
) -> None:
    stream.codec_context.options = {**stream.codec_context.options, "err_detect": "explode"}
    packets: list[Packet] = []  # since the last keyframe but one, with which a decode can start
    starts: list[int] = []
    stamps: list[int | None] = []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_keyframe:
            starts.append(len(packets))
            if len(starts) > 2:
                dropped = starts[1]
                packets, starts = packets[dropped:], [start - dropped for start in starts[1:]]
        packets.append(packet)
        stamps.append(packet.pts)
    if not packets:
        return
    if _ends_in_hole(stamps):
        raise CutShort("frames that are shown before its last one are missing")
    if stated.spacing is not None and ends_with_part(content, stated.spacing, stream.id):
        return
    group = packets[starts[-1] if starts else 0 :]
    if _only_last_fails(stream, packets, starts) or _depends_on_what_follows(stream, group):
        raise CutShort("its last picture is incomplete")


def _ends_in_hole(stamps: Sequence[int | None]) -> bool:
    """True if frames follow each other regularly, except that some before the last are missing.

    A frame that others refer to is stored before those that are shown before it. After a cut
    between them these are missing.
    """
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) < len(stamps):
        return False
    last = known.index(max(known))
    before = sorted(known[:last])
    if len(before) < MIN_REGULAR or before == known[:last]:
        return False  # nothing is reordered
    steps = [second - first for first, second in pairwise(before)]
    usual = median(steps)
    if usual <= 0 or any(abs(step - usual) > 0.1 * usual for step in steps):
        return False
    between = sum(stamp > before[-1] for stamp in known[last + 1 :])
    return round((known[last] - before[-1]) / usual) - 1 > between


def _only_last_fails(stream: VideoStream, packets: Sequence[Packet], starts: Sequence[int]) -> bool:
    """True if the last packet cannot be decoded, while others can.

    Pictures between the first keyframe and the last one may lack what they refer to.
    """
    failed = set[int]()
    for index, packet in enumerate(packets):
        try:
            stream.decode(packet)
            if index == len(packets) - 1:
                stream.decode(None)
        except av.error.FFmpegError:
            failed.add(index)
    needed = {0, *starts, *range(starts[-1] if starts else 0, len(packets) - 1)}
    return failed >= {len(packets) - 1} and not failed & (needed - {len(packets) - 1})


def _depends_on_what_follows(stream: VideoStream, packets: Sequence[Packet]) -> bool:
    """True if the last picture of a group changes with the bytes behind it.

    H.264 and HEVC mark the end of a picture's data, and their decoders read on until they find it.
    """
    if stream.codec_context.name not in ("h264", "hevc"):
        return False
    try:
        first, second = (_last_pictures(stream, packets, tail) for tail in TAILS)
    except av.error.FFmpegError:
        return False
    return any(not np.array_equal(one, other) for one, other in zip(first, second, strict=False))


def _last_pictures(stream: VideoStream, packets: Sequence[Packet], tail: bytes) -> list[np.ndarray]:
    stream.codec_context.flush_buffers()
    for packet in packets[:-1]:
        with suppress(av.error.FFmpegError):
            stream.decode(packet)
    last = Packet(bytes(packets[-1]) + tail)
    last.pts, last.dts, last.time_base = packets[-1].pts, packets[-1].dts, packets[-1].time_base
    frames = [*stream.decode(last), *stream.decode(None)]
    return [frame.to_ndarray(format="gray") for frame in frames]
