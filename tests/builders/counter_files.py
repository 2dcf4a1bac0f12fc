"""Videos of every make whose pictures show their own number in blocks that any codec leaves
readable."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

COLUMNS, ROWS = 4, 3  # 12 bits
TICKS_PER_S = 1000


@dataclass(frozen=True, kw_only=True)
class Make:
    """How a video is encoded and stored."""

    frames: int = 40
    width: int = 64
    height: int = 48
    codec: str = "libx264"
    pixels: str = "yuv420p"
    options: Mapping[str, str] = field(default_factory=lambda: {"preset": "veryfast"})
    container: str = "mp4"
    muxer: Mapping[str, str] = field(default_factory=dict)
    ticks: Sequence[int] = ()
    """When each frame is shown, in thousandths of a second; default: 25 frames a second."""
    shift: int = 0
    """Ticks added to all packets' time stamps; frames below 0 are then not shown."""
    turned: int = 0
    """Degrees by which a player turns the picture clockwise."""

    @property
    def times(self) -> list[int]:
        """Ticks of all frames from the first one on."""
        return list(self.ticks) or [40 * i for i in range(self.frames)]

    @property
    def first(self) -> int:
        """The number of the first frame that is shown."""
        return sum(tick + self.shift < 0 for tick in self.times) if self.shift < 0 else 0


def make_video(make: Make) -> bytes:
    """The file's bytes; frame i shows the number i."""
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=make.container, options=dict(make.muxer)) as output:
            stream = output.add_stream(make.codec, rate=25, options=dict(make.options))
            stream.width, stream.height, stream.pix_fmt = make.width, make.height, make.pixels
            stream.codec_context.thread_count = 1
            if make.container != "avi":  # which knows a frame rate only
                stream.codec_context.time_base = Fraction(1, TICKS_PER_S)
            for index, tick in enumerate(make.times):
                frame = av.VideoFrame.from_ndarray(picture(index, make), format="rgb24")
                frame.pts, frame.time_base = tick, Fraction(1, TICKS_PER_S)
                _mux(output, stream.encode(frame), make.shift)
            _mux(output, stream.encode(None), make.shift)
        content = Path(file.name).read_bytes()
    return _turned(content, make) if make.turned else content


def picture(number: int, make: Make) -> np.ndarray:
    """(height, width, 3) uint8: white blocks for the set bits, the lowest one top left."""
    bits = np.array([(number >> place) & 1 for place in range(COLUMNS * ROWS)], dtype=np.uint8)
    rows = np.arange(make.height) * ROWS // make.height
    columns = np.arange(make.width) * COLUMNS // make.width
    blocks = bits.reshape(ROWS, COLUMNS)[rows][:, columns] * 255
    return np.repeat(blocks[..., None], 3, axis=2)


def number_of(frame: np.ndarray, make: Make) -> int:
    """The number that an upright (H, W, 3) picture shows."""
    stored = np.rot90(frame, make.turned // 90)  # counter-clockwise
    height, width, _ = stored.shape
    assert (width, height) == (make.width, make.height)
    centres = stored[
        (2 * np.arange(ROWS)[:, None] + 1) * height // (2 * ROWS),
        (2 * np.arange(COLUMNS)[None] + 1) * width // (2 * COLUMNS),
    ].mean(axis=2)
    assert ((centres < 80) | (centres > 175)).all(), "a block is neither black nor white"
    return sum(1 << place for place, value in enumerate(centres.ravel()) if value > 127)


def _mux(output: av.container.OutputContainer, packets: list[av.Packet], shift: int) -> None:
    for packet in packets:
        if shift:
            ticks = round(shift / TICKS_PER_S / float(packet.time_base))
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        output.mux(packet)


def _turned(content: bytes, make: Make) -> bytes:
    """The MP4 with the display matrix of a clockwise turn in its track header."""
    video = bytearray(content)
    matrix = video.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version, times and ids, reserved, layer
    one, width, height = 1 << 16, make.width << 16, make.height << 16
    turn = {
        90: (0, one, 0, -one, 0, 0, height, 0),
        180: (-one, 0, 0, 0, -one, 0, width, height),
        270: (0, -one, 0, one, 0, 0, 0, width),
    }[make.turned]
    video[matrix : matrix + 36] = struct.pack(">9i", *turn, 1 << 30)
    return bytes(video)
