"""Tells a file that was cut short by what its container says of its own length.

The fields that tell this are not in what libav returns, so they are read here. Nothing is
allocated by a size in the file, and every list is followed for a limited number of elements.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvr.data_prep.containers.boxes import NEEDED, PADDING, check_mp4, check_realmedia
from tvr.data_prep.containers.ebml import EBML, check_matroska
from tvr.data_prep.containers.elements import Content, number
from tvr.data_prep.containers.mpeg import (
    check_program_stream,
    check_transport_stream,
    packet_spacing,
)
from tvr.data_prep.containers.objects import HEADER, check_asf, check_avi, check_mxf
from tvr.data_prep.containers.pages import (
    check_dv,
    check_flv,
    check_gif,
    check_ivf,
    check_nut,
    check_ogg,
    check_y4m,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatedEnd:
    """What a container says of its end, where its bytes cannot tell."""

    duration_s: float | None = None
    """Duration of the longest stream; None = none is stated, or the sizes tell."""
    spacing: int | None = None
    """Bytes from one packet of a transport stream to the next; None = another container."""


def stated_end(content: Content) -> StatedEnd:
    """Compares a file's size with what its container says.

    Raises CutShort if something that must be there lies behind the end of the file.
    """
    start = bytes(content[:32])
    if number(content, 0, 4) == EBML:
        return StatedEnd(duration_s=check_matroska(content))
    if start[4:8] in NEEDED | PADDING:
        return StatedEnd(duration_s=check_mp4(content))
    if start[:3] == b"FLV":
        return StatedEnd(duration_s=check_flv(content))
    if start[:4] == b"DKIF":
        return StatedEnd(duration_s=check_ivf(content))
    for magic, check in (
        (b"RIFF", check_avi),
        (HEADER, check_asf),
        (b"OggS", check_ogg),
        (b"GIF8", check_gif),
        (b"YUV4MPEG2", check_y4m),
        (b"\x1f\x07\x00", check_dv),
        (b"nut/multimedia container\0", check_nut),
        (b".RMF", check_realmedia),
        (b"\0\0\1\xba", check_program_stream),
    ):
        if start.startswith(magic):
            check(content)
            return StatedEnd()
    spacing = packet_spacing(content)
    if spacing is not None:
        check_transport_stream(content, spacing)
    else:
        check_mxf(content)
    return StatedEnd(spacing=spacing)
