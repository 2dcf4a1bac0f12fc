"""Boxes of MP4 and QuickTime (ISO/IEC 14496-12), and the chunks of RealMedia."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tvr.data_prep.containers.elements import MAX_ELEMENTS, Content, CutShort, number, require

# Boxes of the top level whose bytes are needed. Another one that is larger than the file is taken
# for garbage behind the last box, and padding may be cut.
NEEDED = {b"ftyp", b"moov", b"mdat", b"moof", b"mfra", b"sidx", b"ssix", b"styp", b"meta", b"emsg"}
PADDING = {b"free", b"skip", b"wide"}
REAL_CHUNKS = {b".RMF", b"PROP", b"CONT", b"MDPR", b"DATA", b"INDX"}
REAL_SLACK = 18
"""Some writers count the chunk's own header twice."""


class FileBox(NamedTuple):
    """A box that begins at `at`; `body` is the place of its content."""

    kind: bytes
    at: int
    body: int
    end: int


def boxes(content: Content, at: int, end: int) -> Iterator[FileBox]:
    """Yields the boxes between two places. A box may end behind them."""
    for _ in range(MAX_ELEMENTS):
        if at + 8 > end:
            return
        size, kind, header = number(content, at, 4), bytes(content[at + 4 : at + 8]), 8
        if size == 1:
            size, header = number(content, at + 8, 8), 16
        elif size == 0 and kind != bytes(4):
            size = end - at
        if size < header:
            return
        yield FileBox(kind, at, at + header, at + size)
        at += size


def find_boxes(content: Content, within: FileBox, *path: bytes) -> Iterator[FileBox]:
    """Yields the boxes at a path of kinds within a box."""
    for box in boxes(content, within.body, min(within.end, len(content))):
        if box.kind == path[0]:
            if len(path) == 1:
                yield box
            else:
                yield from find_boxes(content, box, *path[1:])


def check_mp4(content: Content) -> float | None:
    """Raises CutShort for a box, or a fragment that an index lists, behind the end of the file.

    Returns:
        The duration that a fragmented file states; None = it states none.
    """
    kinds, duration_s = [b""], None
    for box in boxes(content, 0, len(content)):
        if box.kind in NEEDED:
            require(content, box.end, f"its box {box.kind.decode()}")
        elif box.kind not in PADDING and box.end > len(content):
            break
        if box.kind == b"sidx":
            _check_segment_index(content, box)
        elif box.kind == b"moov":
            duration_s = _fragments_duration(content, box)
        kinds.append(box.kind)
    if b"mdat" in kinds and not {b"moov", b"moof"} & set(kinds):
        raise CutShort("the list of its pictures (moov) is missing")
    if kinds[-1] == b"moof":
        raise CutShort("the content of its last fragment is missing")
    return duration_s


def _check_segment_index(content: Content, box: FileBox) -> None:
    """Sums the sizes of the segments that follow the box."""
    is_long = number(content, box.body, 1) > 0
    at = box.body + (28 if is_long else 20)
    count = number(content, at + 2, 2) if at + 4 <= box.end else 0
    if at + 4 + 12 * count > box.end:
        return  # damaged: it does not say how long the file is
    offset = number(content, at - 8, 8) if is_long else number(content, at - 4, 4)
    sizes = (number(content, at + 4 + 12 * i, 4) & 0x7FFFFFFF for i in range(count))
    require(content, box.end + offset + sum(sizes), "the last segment of its index (sidx)")


def _fragments_duration(content: Content, movie: FileBox) -> float | None:
    def field(box: FileBox, short: int, long: int) -> int:
        is_long = number(content, box.body, 1) == 1
        return number(content, box.body + (long if is_long else short), 8 if is_long else 4)

    for header in find_boxes(content, movie, b"mvhd"):
        is_long = number(content, header.body, 1) == 1
        per_second = number(content, header.body + (20 if is_long else 12), 4)
        for extent in find_boxes(content, movie, b"mvex", b"mehd"):
            return field(extent, 4, 4) / per_second if per_second else None
    return None


def has_pixel_shape(content: Content, track: int) -> bool:
    """True if the track with this number has a box with the shape of its pixels (pasp)."""
    for movie in boxes(content, 0, len(content)):
        if movie.kind != b"moov":
            continue
        for trak in find_boxes(content, movie, b"trak"):
            headers = find_boxes(content, trak, b"tkhd")
            places = [h.body + (20 if number(content, h.body, 1) == 1 else 12) for h in headers]
            if not places or number(content, places[0], 4) != track:
                continue
            for table in find_boxes(content, trak, b"mdia", b"minf", b"stbl", b"stsd"):
                entries = boxes(content, table.body + 8, min(table.end, len(content)))
                for entry in entries:  # 78 bytes of a picture's fields precede its boxes
                    inner = boxes(content, entry.body + 78, min(entry.end, len(content)))
                    if any(box.kind == b"pasp" for box in inner):
                        return True
    return False


def check_realmedia(content: Content) -> None:
    """Raises CutShort for a chunk behind the end of the file."""
    at = 0
    for _ in range(MAX_ELEMENTS):
        kind, size = bytes(content[at : at + 4]), number(content, at + 4, 4)
        if kind not in REAL_CHUNKS or size < 8:
            return
        slack = REAL_SLACK if kind == b"DATA" else 0
        require(content, at + size - slack, f"its chunk {kind.decode()}")
        at += size
