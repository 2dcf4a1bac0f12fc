"""The frame index of a video as a member of its sample, so that a read need not list all packets.

    magic "FIDX", version (uint16), stream (uint16), frames, keyframes (uint32 each)
    first time stamp, numerator and denominator of `unit_s` and of `rate_hz` (int64 each)
    zlib: steps between the time stamps, then between the keyframes (uint32 each)

All numbers are little-endian. A sample without this member is read from its packets, with the same
frames. Such a member may come from anyone: its values are checked, and each frame that is decoded
is compared with it.
"""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction
from math import gcd

import numpy as np

from tvr.data_prep.records import BadSample
from tvr.data_prep.video.frame_index import FrameIndex, index_packets

INDEX_MEMBER = "fidx"
"""Extension of the member. webdataset decodes no member of this name, and passes its bytes on."""
MAGIC = b"FIDX"
INDEX_VERSION = 1
HEADER = struct.Struct("<4sHHIIqqqqq")
MAX_TIME = 1 << 62
MAX_STREAM = 1 << 10
MAX_FRAMES = 1 << 22  # 19 hours at 60 frames a second
STEP = np.dtype("<u4")


def index_member(
    video: bytes,
    key: str,
    decoded: FrameIndex | None = None,
    packets: FrameIndex | None = None,
) -> dict[str, bytes]:
    """Returns the member of a video's index by its extension.

    Args:
        video: Content of the file.
        key: Name of the sample in error messages.
        packets: Index of the video's packets; None = list them.
        decoded: Index of the frames of a decode, with which the packets must agree.

    Returns:
        An empty dict if the index would not help: the video has no reliable time stamps, or its
        packets differ from its frames.
    """
    index = index_packets(video, key) if packets is None else packets
    agrees = decoded is None or (index.pts, index.unit_s, None) == (
        *(decoded.pts, decoded.unit_s, decoded.stamps),
    )
    content = encode_index(index) if agrees else None
    return {} if content is None else {INDEX_MEMBER: content}


def encode_index(index: FrameIndex) -> bytes | None:
    """Returns an index as bytes; None if it has no time stamps, mended ones, or steps too large
    to store."""
    if index.pts is None or index.stamps is not None:
        return None
    steps = np.diff(np.array(index.pts, dtype=np.int64))
    jumps = np.diff(np.array([0, *index.keyframes], dtype=np.int64))
    numbers = (*index.unit_s.as_integer_ratio(), *index.rate_hz.as_integer_ratio())
    if (steps >= 1 << 32).any() or abs(index.pts[0]) >= MAX_TIME or index.stream >= MAX_STREAM:
        return None
    if index.num_frames > MAX_FRAMES:
        return None
    header = HEADER.pack(
        *(MAGIC, INDEX_VERSION, index.stream, index.num_frames, len(index.keyframes)),
        *(index.pts[0], *numbers),
    )
    return header + zlib.compress(steps.astype(STEP).tobytes() + jumps.astype(STEP).tobytes(), 9)


def decode_index(content: bytes, video_bytes: int, key: str) -> FrameIndex:
    """Parses a stored index.

    Args:
        content: The member.
        video_bytes: Size of its video, in which each frame has at least one byte.
        key: Name of the sample in error messages.

    Raises:
        BadSample: the content is of another version, damaged, or a value is not allowed.
    """

    try:
        return _parsed(content, video_bytes)
    except (ValueError, zlib.error) as error:
        raise BadSample(key, "unreadable", f"{INDEX_MEMBER}: {error}") from error


def _parsed(content: bytes, video_bytes: int) -> FrameIndex:
    if len(content) < HEADER.size:
        raise ValueError(f"{len(content)} bytes must be at least {HEADER.size}")
    magic, version, stream, frames, keyframes, first, *numbers = HEADER.unpack_from(content)
    if (magic, version) != (MAGIC, INDEX_VERSION):
        raise ValueError(f"{magic!r}, version {version} must be {MAGIC!r}, version {INDEX_VERSION}")
    if not (
        1 <= frames <= min(video_bytes, MAX_FRAMES) and keyframes <= frames and stream < MAX_STREAM
    ):
        raise ValueError(f"{frames} frames, {keyframes} keyframes of stream {stream} are too many")
    fractions = [(numbers[at], numbers[at + 1]) for at in (0, 2)]
    if abs(first) >= MAX_TIME or any(min(pair) < 1 or gcd(*pair) > 1 for pair in fractions):
        raise ValueError(f"first time {first} and fractions {fractions} are out of range")
    steps, jumps = _numbers(content[HEADER.size :], frames - 1, keyframes)
    places = np.cumsum(jumps)
    # The first frame is a keyframe or none; later ones must ascend.
    if (steps == 0).any() or (jumps[1:] == 0).any() or (keyframes and places[-1] >= frames):
        raise ValueError("times or keyframes do not ascend")
    times = np.cumsum(np.append(np.int64(first), steps))
    return FrameIndex(
        pts=tuple(times.tolist()),
        num_frames=frames,
        keyframes=tuple(places.tolist()),
        unit_s=Fraction(*fractions[0]),
        rate_hz=Fraction(*fractions[1]),
        stream=stream,
    )


def _numbers(packed: bytes, num_steps: int, num_jumps: int) -> tuple[np.ndarray, np.ndarray]:
    """Unpacks the steps, in memory that the counts bound."""
    expected = (num_steps + num_jumps) * STEP.itemsize
    unpacker = zlib.decompressobj()
    raw = unpacker.decompress(packed, expected + 1)
    if len(raw) != expected or not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"its numbers must have {expected} bytes")
    values = np.frombuffer(raw, STEP).astype(np.int64)
    return values[:num_steps], values[num_steps:]
