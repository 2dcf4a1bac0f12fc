"""Objects of ASF (WMV), chunks of AVI, and the units of MXF."""

from __future__ import annotations

from tvr.data_prep.containers.elements import MAX_ELEMENTS, Content, CutShort, number, require

HEADER, PROPERTIES, DATA, SIMPLE_INDEX, INDEX, MEDIA_INDEX, TIMECODE_INDEX = (
    bytes.fromhex(text)
    for text in (
        "3026b2758e66cf11a6d900aa0062ce6c",
        "a1dcab8c47a9cf118ee400c00c205365",
        "3626b2758e66cf11a6d900aa0062ce6c",
        "90080033b1e5cf1189f400a0c90349cb",
        "d329e2d6da35d111903400a0c90349be",
        "f803b1fead12644c840f2a1d2f7ad48c",
        "d03fb73c4a0c0348953dedf7b6228f0c",
    )
)
ASF_OBJECTS = {
    HEADER: "header",
    DATA: "list of packets",
    **dict.fromkeys((SIMPLE_INDEX, INDEX, MEDIA_INDEX, TIMECODE_INDEX), "index"),
}
BROADCAST = 1
UNKNOWN_SIZES = (0, 0xFFFFFFFF)
RIFF_SLACK = 8
"""Some writers count the eight bytes of the chunk's own header."""


def check_asf(content: Content) -> None:
    """Raises CutShort for an object behind the end of the file.

    A file that says that it is a broadcast has no sizes.
    """
    at, is_broadcast = 0, False
    for _ in range(MAX_ELEMENTS):
        kind, size = bytes(content[at : at + 16]), number(content, at + 16, 8, "little")
        if kind not in ASF_OBJECTS or size < 24 or (kind == DATA and is_broadcast):
            return
        require(content, at + size, f"its {ASF_OBJECTS[kind]}")
        if kind == HEADER:
            is_broadcast = _is_broadcast(content, at + 30, at + size)
        at += size


def _is_broadcast(content: Content, at: int, end: int) -> bool:
    for _ in range(MAX_ELEMENTS):
        size = number(content, at + 16, 8, "little")
        if at + 24 > end or size < 24:
            return False
        if content[at : at + 16] == PROPERTIES:
            return bool(number(content, at + 88, 4, "little") & BROADCAST)
        at += size
    return False


def check_avi(content: Content) -> None:
    """Raises CutShort for a chunk behind the end of the file.

    The size of the whole counts only if no index follows the pictures: many writers get it wrong.
    """
    at = 0
    for _ in range(MAX_ELEMENTS):
        size = number(content, at + 4, 4, "little")
        if content[at : at + 4] != b"RIFF" or size in UNKNOWN_SIZES:
            return
        end, has_index = at + 8 + size, False
        inner = at + 12
        for _ in range(MAX_ELEMENTS):
            kind = bytes(content[inner : inner + 4])
            length = number(content, inner + 4, 4, "little")
            if inner + 8 > min(end, len(content)) or length in UNKNOWN_SIZES:
                break
            if kind in (b"LIST", b"idx1"):
                name = bytes(content[inner + 8 : inner + 12]) if kind == b"LIST" else kind
                require(content, inner + 8 + length, f"its chunk {name.decode('ascii', 'replace')}")
            elif inner + 8 + length > len(content):
                break
            has_index |= kind == b"idx1"
            inner += 8 + length + length % 2
        if not has_index:
            require(content, end - RIFF_SLACK, "its chunk RIFF")
        at = end + size % 2


MXF_KEY = bytes.fromhex("060e2b34")
PARTITION = bytes.fromhex("060e2b34020501010d01020101")
PARTITION_KINDS = (2, 3, 4)  # of the header, of the content, of the end
MAX_RUN_IN = 1 << 16


def check_mxf(content: Content) -> None:
    """Raises CutShort for a unit, or the last partition, behind the end of the file."""
    start = content.find(PARTITION, 0, MAX_RUN_IN + len(PARTITION))
    if start < 0:
        return
    at = start
    for _ in range(MAX_ELEMENTS):
        if content[at : at + 4] != MXF_KEY:
            if 0 < len(content) - at < 4:
                raise CutShort("the key of its last unit is incomplete")
            return
        size, length = number(content, at + 16, 1), 1
        if size >= 0x80:
            length += size & 0x7F
            if not 2 <= length <= 9:
                return
            size = number(content, at + 17, length - 1)
        body = at + 16 + length
        require(content, body + size, "its last unit")
        kind = number(content, at + 13, 1)
        if content[at : at + 13] == PARTITION and kind in PARTITION_KINDS and size >= 32:
            footer = number(content, body + 24, 8)
            require(content, start + footer + 1 if footer else 0, "its last partition")
        at = body + size
