"""Packets of MPEG transport streams and program streams (ISO/IEC 13818-1).

Neither says how long it is. What can be told: whether the last packets are whole, and whether
packets are missing between.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tvr.data_prep.containers.elements import MAX_ELEMENTS, Content, CutShort, number, require

SYNC, PACKET = 0x47, 188
SPACINGS = (188, 192, 204)  # plain, with times (Blu-ray, AVCHD), with a checksum
PROBES = 5
MAX_TAIL = 1 << 16
"""Packets before the end among which each stream's last part is searched."""
NULL_PID = 0x1FFF
PES_START = b"\0\0\1"
PACK, SYSTEM, END = 0xBA, 0xBB, 0xB9


class TransportPacket(NamedTuple):
    """The fields of a packet with content."""

    pid: int
    is_start: bool
    """It begins a part of its stream, such as a picture."""
    counter: int
    """Counts the packets of a stream, modulo 16."""
    is_stuffed: bool
    """It has bytes without meaning: the part ends in it."""
    is_random_access: bool
    """A decode can start with it."""
    payload: bytes


def packet_spacing(content: Content) -> int | None:
    """Returns the bytes from one transport packet to the next; None = no transport stream."""
    for spacing in SPACINGS:
        last = min(spacing, len(content) - (PROBES - 1) * spacing)
        for at in range(last):
            if all(content[at + i * spacing] == SYNC for i in range(PROBES)):
                return spacing
    return None


def check_transport_stream(content: Content, spacing: int) -> None:
    """Raises CutShort for an incomplete packet, or a part of known length without its end."""
    end = _last_end(content, spacing)
    if 0 < len(content) - end < PACKET and content[end] == SYNC:
        raise CutShort(f"its last packet has {len(content) - end} of {PACKET} bytes")
    lengths, found = dict[int, int](), set[int]()
    for at in _places_backwards(len(content), end, spacing):
        packet = _packet(content, at)
        if packet is None or packet.pid in found:
            continue
        lengths[packet.pid] = lengths.get(packet.pid, 0) + len(packet.payload)
        if packet.is_start:
            found.add(packet.pid)
            if packet.payload[:3] != PES_START:
                continue  # a table
            stated = number(packet.payload, 4, 2)
            if stated and lengths[packet.pid] < 6 + stated:
                has = f"has {lengths[packet.pid]} of {6 + stated} bytes"
                raise CutShort(f"the last part of its stream {packet.pid} {has}")


def ends_with_part(content: Content, spacing: int, pid: int) -> bool:
    """True if the last packet of a stream shows that a part ends in it.

    A part ends with its packet, which is filled up. One in 184 parts needs no filling.
    """
    end = _last_end(content, spacing)
    for at in _places_backwards(len(content), end, spacing):
        packet = _packet(content, at)
        if packet is not None and packet.pid == pid:
            return packet.is_stuffed
    return False


def count_joins(content: Content, pid: int) -> tuple[int, int]:
    """Counts the places in a transport stream where packets of one of its streams seem to be lost.

    Where another recording begins, which was appended, nothing is lost. There a part begins, and
    its time is before that of the last one, or it can be decoded alone, tables precede it and its
    count begins at 0.

    Returns:
        Places where another recording begins, and places where packets are lost.
    """
    joins = losses = 0
    last: TransportPacket | None = None
    last_time, has_tables = -1, False
    spacing = packet_spacing(content)
    at = None if spacing is None else _first_place(content, spacing)
    while spacing is not None and at is not None and at + PACKET <= len(content):
        if content[at] != SYNC:
            at = _first_place(content, spacing, at)
            continue
        place, at = at, at + spacing
        this_pid = number(content, place + 1, 2) & NULL_PID
        has_tables |= not this_pid
        packet = _packet(content, place) if this_pid == pid else None
        if packet is None:
            continue
        time = _part_time(packet)
        # A packet may be sent twice.
        if last is not None and packet.counter not in (last.counter, (last.counter + 1) % 16):
            is_first = has_tables and packet.is_random_access and packet.counter == 0
            if packet.is_start and (is_first or 0 <= time < last_time):
                joins += 1
            else:
                losses += 1
        last, has_tables = packet, False
        last_time = time if time >= 0 else last_time
    return joins, losses


def _part_time(packet: TransportPacket) -> int:
    """Returns the decoding time of the part that begins in a packet; -1 = none."""
    head = packet.payload
    if not packet.is_start or head[:3] != PES_START or len(head) < 19 or not head[7] & 0x80:
        return -1
    at = 14 if head[7] & 0x40 else 9
    a, b, c = head[at], number(head, at + 1, 2), number(head, at + 3, 2)
    return (a >> 1 & 7) << 30 | b >> 1 << 15 | c >> 1


def check_program_stream(content: Content) -> None:
    """Raises CutShort for a packet behind the end of the file."""
    start = PES_START + bytes([PACK])
    at = content.rfind(start)
    for _ in range(MAX_ELEMENTS):
        left = len(content) - at
        if at < 0 or (left >= 4 and content[at : at + 3] != PES_START):
            return  # bytes behind the last packet
        if left < 4:
            if left and PES_START.startswith(content[at : at + 3]) and content[at:] != bytes(left):
                raise CutShort("the start of its last packet is incomplete")
            return
        kind = content[at + 3]
        if kind == END or kind < END:
            return
        if kind == PACK:
            is_second = number(content, at + 4, 1) >> 6 == 1
            size = 14 + (number(content, at + 13, 1) & 7) if is_second else 12
        else:
            size = 6 + number(content, at + 4, 2)
        require(content, at + size, "its last packet")
        at += size


def _places_backwards(size: int, end: int, spacing: int) -> Iterator[int]:
    for count in range(1, MAX_TAIL):
        at = end - count * spacing
        if at < 0:
            return
        if at + PACKET <= size:
            yield at


def _last_end(content: Content, spacing: int) -> int:
    """Returns the place where the packet after the last whole one begins, or would begin."""
    for rest in range(spacing):
        end = len(content) - rest
        places = range(end - spacing, max(-1, end - (PROBES + 1) * spacing), -spacing)
        if len(places) and all(content[at] == SYNC for at in places):
            # Between spaced packets lie bytes of others, after which the last one may be whole.
            return end + spacing if PACKET <= rest and content[end] == SYNC else end
    return len(content)


def _first_place(content: Content, spacing: int, start: int = 0) -> int | None:
    at = content.find(bytes([SYNC]), start)
    while at >= 0:
        following = at + spacing
        if following >= len(content) or content[following] == SYNC:
            return at
        at = content.find(bytes([SYNC]), at + 1)
    return None


def _packet(content: Content, at: int) -> TransportPacket | None:
    """Reads a packet; None if it has no content, is damaged or is scrambled."""
    head = number(content, at, 4)
    pid = head >> 8 & NULL_PID
    if head >> 24 != SYNC or head >> 23 & 1 or head >> 6 & 3 or pid == NULL_PID or not head & 16:
        return None
    body, flags, is_stuffed = at + 4, 0, False
    if head & 32:
        length = content[body]
        if length > 183:
            return None
        flags = content[body + 1] if length else 0
        used = 1 + 6 * (flags >> 4 & 1) + 6 * (flags >> 3 & 1) + (flags >> 2 & 1)
        # Private data and extensions, which have lengths of their own, are not stuffing.
        is_stuffed = not flags & 3 and length != used
        body += 1 + length
    payload = bytes(content[body : at + PACKET])
    is_start, is_random_access = bool(head >> 22 & 1), bool(flags & 64)
    return TransportPacket(pid, is_start, head & 15, is_stuffed, is_random_access, payload)
