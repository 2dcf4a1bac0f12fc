"""Elements of Matroska and WebM (RFC 8794, RFC 9559)."""

from __future__ import annotations

import struct

from tvr.data_prep.containers.elements import MAX_ELEMENTS, Content, CutShort, number, require

EBML, SEGMENT, INFO, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1549A966, 0x1F43B675
SCALE, DURATION = 0x2AD7B1, 0x4489
# Level 1: info, seek head, clusters, tracks, cues, attachments, chapters, tags, padding.
LEVEL_1 = {INFO, 0x114D9B74, CLUSTER, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367}
# In a cluster: time, silent tracks, position, previous size, two kinds of blocks.
IN_CLUSTER = {0xE7, 0x5854, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF}
ANYWHERE = {0xEC, 0xBF}


def check_matroska(content: Content) -> float | None:
    """Raises CutShort for a segment or an element behind the end of the file.

    A live stream has a segment of unknown size, whose elements are then looked at.

    Returns:
        The duration that a segment of unknown size states; None = none, or the size tells.
    """
    at = 0
    for _ in range(MAX_ELEMENTS):
        element, size, body = _element(content, at)
        if element == SEGMENT:
            if size is None:
                # Written to a pipe. The duration was written first, and is that of the source: the
                # file may hold a part of it.
                _check_elements(content, body)
                return None
            require(content, body + size, "its segment")
            return None
        if size is None or body + size > len(content):
            return None
        at = body + size
    return None


def _check_elements(content: Content, at: int) -> float | None:
    duration_s = None
    known = LEVEL_1 | IN_CLUSTER | ANYWHERE
    for _ in range(MAX_ELEMENTS):
        if at >= len(content):
            break
        element, size, body = _element(content, at)
        if element not in known and (body <= len(content) or not element):
            break  # another segment, or bytes that are none of Matroska's
        if body > len(content):
            raise CutShort("its last element is incomplete")
        if size is None:
            at = body  # its elements follow
            continue
        require(content, body + size, "its last element")
        if element == INFO:
            duration_s = _duration(content, body, body + size)
        at = body + size
    return duration_s


def _duration(content: Content, at: int, end: int) -> float | None:
    scale, duration = 1_000_000, 0.0
    for _ in range(MAX_ELEMENTS):
        element, size, body = _element(content, at)
        if size is None or body + size > end:
            break
        if element == SCALE:
            scale = number(content, body, min(size, 8))
        elif element == DURATION and size in (4, 8):
            (duration,) = struct.unpack(">f" if size == 4 else ">d", content[body : body + size])
        at = body + size
    seconds = duration * scale / 1e9
    return seconds if 0 < seconds < 1e9 else None


def _element(content: Content, at: int) -> tuple[int, int | None, int]:
    """Returns an element's id, its size (None = unknown) and the place of its content."""
    first = number(content, at, 1)
    id_length = 9 - first.bit_length() if first else 1
    place = at + id_length
    first = number(content, place, 1)
    length = 9 - first.bit_length() if first else 1
    largest = (1 << 7 * length) - 1
    size = number(content, place, length) & largest
    return number(content, at, id_length), None if size == largest else size, place + length
