"""Reads from H.264 and HEVC packets whether later pictures are of another kind than the first.

A decoder that gives only pixels hides such a change, and decoding every frame to see it would be
slow. Both codecs announce it in a keyframe's packet: a new sequence parameter set (SPS), which has
the size, the shape of pixels and the colours, or a message (SEI) with the orientation.
"""

from __future__ import annotations

from collections.abc import Iterator

from av.codec.context import CodecContext
from av.packet import Packet

# NAL unit types of (parameter set, message) and the bytes before their content.
NAL_TYPES = {"h264": (7, 6, 1), "hevc": (33, 39, 2)}
DISPLAY_ORIENTATION = 47


def changes_pictures(packet: Packet, context: CodecContext) -> bool:
    """True if a keyframe's packet announces pictures of another kind than `context` was opened
    with; False for other codecs, which do not announce it."""
    if packet.has_sidedata("new_extradata"):
        return True
    if context.name not in NAL_TYPES:
        return False
    known = context.extradata or b""
    parameter_set = NAL_TYPES[context.name][0]
    units = _nal_units(bytes(packet), known, context.name)
    is_new = any(kind == parameter_set and unit not in known for kind, unit in units)
    return is_new or has_orientation(packet, context)


def has_orientation(packet: Packet, context: CodecContext) -> bool:
    """True if a packet has a message with the orientation of its picture."""
    if context.name not in NAL_TYPES:
        return False
    _, message, header = NAL_TYPES[context.name]
    units = _nal_units(bytes(packet), context.extradata or b"", context.name)
    return any(
        kind == message and DISPLAY_ORIENTATION in _message_types(unit[header:])
        for kind, unit in units
    )


def _nal_units(content: bytes, extradata: bytes, codec: str) -> Iterator[tuple[int, bytes]]:
    """Yields (type, content) of each unit of a packet."""
    for unit in _split(content, extradata, codec):
        yield (unit[0] & 31 if codec == "h264" else unit[0] >> 1 & 63), unit


def _split(content: bytes, extradata: bytes, codec: str) -> Iterator[bytes]:
    if extradata[:1] != b"\1":  # Annex B: start codes
        for unit in content.split(b"\0\0\1")[1:]:
            if unit := unit.rstrip(b"\0"):
                yield unit
        return
    at, size_byte = 0, 4 if codec == "h264" else 21
    if len(extradata) <= size_byte:
        return
    size_bytes = (extradata[size_byte] & 3) + 1
    while at + size_bytes < len(content):
        size = int.from_bytes(content[at : at + size_bytes], "big")
        at += size_bytes
        if size:
            yield content[at : at + size]
        at += size


def _message_types(content: bytes) -> list[int]:
    """Returns the types of a unit's messages. Each has its type and size as sums of bytes."""
    found, at = [], 0
    while at + 2 <= len(content) and content[at] != 0x80:  # the unit's end
        values = []
        for _ in range(2):
            value = 0
            while at < len(content) and content[at] == 0xFF:
                value, at = value + 255, at + 1
            if at < len(content):
                value, at = value + content[at], at + 1
            values.append(value)
        found.append(values[0])
        at += values[1]
    return found
