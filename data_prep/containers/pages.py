"""Tags of FLV, pages of Ogg, blocks of GIF, and the frames of simple containers."""

from __future__ import annotations

import struct

from tvr.data_prep.containers.elements import MAX_ELEMENTS, Content, CutShort, number, require

FLV_TYPES = (8, 9, 18)  # sound, pictures, data
MAX_METADATA = 1 << 20
END_OF_STREAM = 4
# How the first page of a stream of pictures begins: Theora, VP8, Dirac, and OGM's own header.
OGG_PICTURES = (b"\x80theora", b"OVP80", b"BBCD\0", b"\x01video")


def check_flv(content: Content) -> float | None:
    """Raises CutShort for a tag behind the end of the file, or a smaller file than it says.

    Returns:
        The duration that the file states; None = it states none.
    """
    at, size, duration_s = number(content, 5, 4) + 4, 0.0, 0.0
    for index in range(MAX_ELEMENTS):
        if number(content, at, 1) & 0x1F not in FLV_TYPES:
            break
        end = at + 11 + number(content, at + 1, 3)
        require(content, end, "its last tag")
        if index == 0 and content[at] == 18:
            data = bytes(content[at + 11 : min(end, at + MAX_METADATA)])
            size, duration_s = _amf_number(data, b"filesize"), _amf_number(data, b"duration")
        at = end + 4
        if end < len(content) < at:
            raise CutShort("the size of its last tag is incomplete")
    require(content, int(min(size, 1 << 62)), "the size that it states")
    return duration_s or None


def _amf_number(data: bytes, name: bytes) -> float:
    """Returns a property of a script tag; 0 = it is absent or no usable number."""
    at = data.find(struct.pack(">H", len(name)) + name + b"\0")
    place = at + 3 + len(name)
    if at < 0 or place + 8 > len(data):
        return 0.0
    (value,) = struct.unpack_from(">d", data, place)
    return value if 0 < value < 1 << 53 else 0.0


def check_ogg(content: Content) -> None:
    """Raises CutShort for a page behind the end of the file, or pictures without a last page."""
    at, ended = 0, dict[int, bool]()
    for _ in range(MAX_ELEMENTS):
        if content[at : at + 4] != b"OggS":
            if 0 < len(content) - at < 4 and b"OggS".startswith(content[at:]):
                raise CutShort("its last page is incomplete")
            break
        flags, serial, segments = content[at + 5 : at + 6], content[at + 14 : at + 18], at + 27
        body = segments + number(content, at + 26, 1)
        end = body + sum(content[segments:body])
        require(content, max(end, body), "its last page")
        stream = number(serial, 0, 4)
        if flags[0] & 2 and content[body : body + 8].startswith(OGG_PICTURES):
            ended[stream] = False
        if stream in ended:
            ended[stream] = bool(flags[0] & END_OF_STREAM)
        at = end
    else:
        return
    if not all(ended.values()):
        raise CutShort("no page is marked as the last one of its pictures")


def check_gif(content: Content) -> None:
    """Raises CutShort for a block behind the end of the file."""

    def colours(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    at = 13 + colours(number(content, 10, 1))
    for _ in range(MAX_ELEMENTS):
        kind = number(content, at, 1)
        if at >= len(content) or kind not in (0x21, 0x2C):
            return
        at += 2 if kind == 0x21 else 11 + colours(number(content, at + 9, 1))
        for _ in range(MAX_ELEMENTS):
            require(content, at + 1, "its last block")
            length = number(content, at, 1)
            at += 1 + length
            if not length:
                break


def check_ivf(content: Content) -> float | None:
    """Raises CutShort for a frame behind the end of the file; returns the duration in its header,
    None = none."""
    at = number(content, 6, 2, "little")
    for _ in range(MAX_ELEMENTS):
        if at < 32 or at >= len(content):
            break
        at += 12 + number(content, at, 4, "little")
        require(content, at, "its last frame")
    rate, scale, length = (number(content, at, 4, "little") for at in (16, 20, 24))
    is_known = rate and scale and 0 < length < 0xFFFFFFFF  # a pipe has no room for the number
    return length * scale / rate if is_known else None


def check_y4m(content: Content) -> None:
    """Raises CutShort for a frame behind the end of the file; all have the size of the first."""
    first = content.find(b"FRAME")
    second = content.find(b"FRAME", first + 5)
    if 0 < first < second and (len(content) - first) % (second - first):
        raise CutShort("its last frame is incomplete")


def check_dv(content: Content) -> None:
    """Raises CutShort for a frame behind the end of the file; all have the same size."""
    size = 144_000 if number(content, 3, 1) & 0x80 else 120_000  # 12 or 10 sequences of blocks
    if len(content) % size:
        raise CutShort(f"its last frame has {len(content) % size} of {size} bytes")


NUT_INDEX = bytes.fromhex("4e58dd672f23e64e")


def _is_index(content: Content, length: int) -> bool:
    start = len(content) - length
    return content[start : start + 8] == NUT_INDEX


def check_nut(content: Content) -> None:
    """Raises CutShort unless the file ends with its index, in which its length is the last word."""
    length = number(content, max(0, len(content) - 12), 8)
    if not 20 <= length <= len(content) or not _is_index(content, length):
        raise CutShort("the index at its end is missing")
