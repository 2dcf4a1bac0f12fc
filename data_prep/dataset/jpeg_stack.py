"""How a beton holds one sample: a stack of JPEG frames, then its JSON.

All numbers are little-endian, 4 bytes: the number of frames, the bytes of each; then the frames as
they were packed, end to end. The rest of the range is the JSON.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tvr.data_prep.records import BadSample


def stack_bytes(jpegs: Sequence[bytes]) -> bytes:
    """The stack of a sample's frames."""
    sizes = [len(jpeg) for jpeg in jpegs]
    return struct.pack(f"<{1 + len(sizes)}I", len(sizes), *sizes) + b"".join(jpegs)


def split_stack(content: bytes, key: str) -> dict[str, bytes]:
    """A sample's range -> its members by extension, as in a shard. Raises BadSample."""
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
        raise BadSample(key, "missing_member", f"{len(content)} bytes for a stack of {start}")
    return {**members, "json": content[start:]}


def stack_names(count: int) -> list[str]:
    """The extensions of a stack's frames, in order, as packing names them."""
    digits = max(2, len(str(count - 1)))
    return [f"{index:0{digits}d}.jpg" for index in range(count)]
