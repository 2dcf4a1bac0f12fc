"""Videos of many encodings whose frames show their own number in blocks that survive any codec."""

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
class Encoding:
    """Codec, container and time stamps of a video."""

    frames: int = 40
    width: int = 64
    height: int = 48
    codec: str = "libx264"
    pixels: str = "yuv420p"
    options: Mapping[str, str] = field(default_factory=lambda: {"preset": "veryfast"})
    container: str = "mp4"
    muxer: Mapping[str, str] = field(default_factory=dict)
    ticks: Sequence[int] = ()
    """Time of each frame in milliseconds; default: 25 frames a second."""
    shift: int = 0
    """Milliseconds added to all packets' time stamps; frames before 0 are not presented."""
    rotation: int = 0
    """Degrees by which a player rotates the picture clockwise."""

    @property
    def times(self) -> list[int]:
        """Ticks of all frames."""
        return list(self.ticks) or [40 * i for i in range(self.frames)]

    @property
    def first(self) -> int:
        """Index of the first frame that is presented."""
        return sum(tick + self.shift < 0 for tick in self.times) if self.shift < 0 else 0


def make_video(encoding: Encoding) -> bytes:
    """Returns a video file; frame i shows the number i."""
    with tempfile.NamedTemporaryFile() as file:
        with av.open(
            file.name, "w", format=encoding.container, options=dict(encoding.muxer)
        ) as output:
            stream = output.add_stream(encoding.codec, rate=25, options=dict(encoding.options))
            stream.width, stream.height = encoding.width, encoding.height
            stream.pix_fmt = encoding.pixels
            stream.codec_context.thread_count = 1
            if encoding.container != "avi":  # AVI stores a frame rate only
                stream.codec_context.time_base = Fraction(1, TICKS_PER_S)
            for index, tick in enumerate(encoding.times):
                frame = av.VideoFrame.from_ndarray(picture(index, encoding), format="rgb24")
                frame.pts, frame.time_base = tick, Fraction(1, TICKS_PER_S)
                _mux(output, stream.encode(frame), encoding.shift)
            _mux(output, stream.encode(None), encoding.shift)
        content = Path(file.name).read_bytes()
    return _rotate(content, encoding) if encoding.rotation else content


def picture(number: int, encoding: Encoding) -> np.ndarray:
    """Returns (height, width, 3) uint8: white blocks for set bits, the lowest bit top left."""
    bits = np.array([(number >> bit) & 1 for bit in range(COLUMNS * ROWS)], dtype=np.uint8)
    rows = np.arange(encoding.height) * ROWS // encoding.height
    columns = np.arange(encoding.width) * COLUMNS // encoding.width
    blocks = bits.reshape(ROWS, COLUMNS)[rows][:, columns] * 255
    return np.repeat(blocks[..., None], 3, axis=2)


def number_of(frame: np.ndarray, encoding: Encoding) -> int:
    """Reads the number from an upright frame (H, W, 3)."""
    stored = np.rot90(frame, encoding.rotation // 90)  # counter-clockwise
    height, width, _ = stored.shape
    assert (width, height) == (encoding.width, encoding.height)
    centres = stored[
        (2 * np.arange(ROWS)[:, None] + 1) * height // (2 * ROWS),
        (2 * np.arange(COLUMNS)[None] + 1) * width // (2 * COLUMNS),
    ].mean(axis=2)
    assert ((centres < 80) | (centres > 175)).all(), "a block is neither black nor white"
    return sum(1 << bit for bit, value in enumerate(centres.ravel()) if value > 127)


def _mux(output: av.container.OutputContainer, packets: list[av.Packet], shift: int) -> None:
    for packet in packets:
        if shift:
            ticks = round(shift / TICKS_PER_S / float(packet.time_base))
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        output.mux(packet)


def _rotate(content: bytes, encoding: Encoding) -> bytes:
    """Writes the display matrix of a clockwise rotation to the MP4's track header."""
    video = bytearray(content)
    matrix = video.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version, times and ids, reserved, layer
    one, width, height = 1 << 16, encoding.width << 16, encoding.height << 16
    turn = {
        90: (0, one, 0, -one, 0, 0, height, 0),
        180: (-one, 0, 0, 0, -one, 0, width, height),
        270: (0, -one, 0, one, 0, 0, 0, width),
    }[encoding.rotation]
    video[matrix : matrix + 36] = struct.pack(">9i", *turn, 1 << 30)
    return bytes(video)
