"""Byte format of one sample in a beton: a stack of JPEG frames, followed by the sample's JSON.

All numbers are little-endian uint32. The stack holds the number of frames, the size of each frame
in bytes, and the frames as they were packed. The rest of the byte range is the JSON.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tvr.data_prep.records import BadSample


def stack_bytes(jpegs: Sequence[bytes]) -> bytes:
    """Encodes the frames of a sample as a stack."""
    sizes = [len(jpeg) for jpeg in jpegs]
    return struct.pack(f"<{1 + len(sizes)}I", len(sizes), *sizes) + b"".join(jpegs)


def split_stack(content: bytes, key: str) -> dict[str, bytes]:
    """Splits a sample's byte range into members by file extension, as in a shard.

    Raises:
        BadSample: the range is too short for its stack.
    """
    try:
        (count,) = struct.unpack_from("<I", content)
        sizes = struct.unpack_from(f"<{count}I", content, 4)
    except struct.error as error:
        raise BadSample(key, "missing_member", f"no stack of frames: {error}") from error
    members = {}
    start = 4 * (1 + count)
    for name, size in zip(stack_names(count), sizes, strict=True):
        members[name] = content[start : start + size]
        start += size
    if start > len(content):
        raise BadSample(
            key, "missing_member", f"the stack needs {start} bytes, the range has {len(content)}"
        )
    return {**members, "json": content[start:]}


def stack_names(count: int) -> list[str]:
    """Returns the member names of `count` frames in order, as packing assigns them."""
    digits = max(2, len(str(count - 1)))
    return [f"{index:0{digits}d}.jpg" for index in range(count)]
