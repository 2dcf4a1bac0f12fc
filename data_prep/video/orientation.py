"""How the stored picture is turned and mirrored to be shown: the display matrix."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import numpy as np
from av.sidedata.sidedata import SideData, SideDataContainer, Type
from av.video.frame import VideoFrame

Matrix = tuple[int, ...]
"""libav's display matrix, row by row: a stored (x, y) is shown at (a x + c y, b x + d y), where a
and b are the values 0 and 1, c and d the values 3 and 4. The translation moves the whole picture
and has no effect here."""


@dataclass(frozen=True, slots=True)
class Orientation:
    """One of the eight ways to turn and mirror a picture."""

    is_transposed: bool = False
    """Rows become columns, before the following two."""
    is_mirrored: bool = False
    """Left and right change places."""
    is_flipped: bool = False
    """Top and bottom change places."""

    def apply(self, pictures: np.ndarray) -> np.ndarray:
        """Returns a view of pictures (..., H, W, 3) as they are shown."""
        if self.is_transposed:
            pictures = pictures.swapaxes(-3, -2)
        rows, columns = (
            slice(None, None, -1 if b else 1) for b in (self.is_flipped, self.is_mirrored)
        )
        return pictures[..., rows, columns, :]


UPRIGHT = Orientation()
QUARTER_TURNS = (
    UPRIGHT,
    Orientation(is_transposed=True, is_flipped=True),
    Orientation(is_mirrored=True, is_flipped=True),
    Orientation(is_transposed=True, is_mirrored=True),
)
"""Orientation of each number of quarter turns, counter-clockwise, as np.rot90 makes them."""


def orientation_of(matrix: Matrix | None) -> Orientation:
    """Returns the orientation nearest to a display matrix, of any scale, angle and translation."""
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d = matrix[:5]
    if abs(a) + abs(d) >= abs(b) + abs(c):  # a matrix of zeros changes nothing
        return Orientation(is_mirrored=a < 0, is_flipped=d < 0)
    return Orientation(is_transposed=True, is_mirrored=c < 0, is_flipped=b < 0)


def shape_in_matrix(matrix: Matrix) -> tuple[Fraction, Fraction] | None:
    """Returns the shape of a pixel that a matrix with unequal scales gives; None = no such scale.

    Returns:
        Width / height of a stored pixel; and the ratio of the shown width's scale to the shown
        height's, which libav reports as the pixels' shape, also where the picture is transposed.
    """
    a, b, _, c, d = matrix[:5]
    scales = [math.hypot(*pair) for pair in ((a, b), (c, d), (a, c), (b, d))]
    if min(scales) < 1:
        return None
    stored, shown = (
        Fraction(first / second).limit_denominator(10000)
        for first, second in (scales[:2], scales[2:])
    )
    return (stored, shown) if stored != 1 else None


def display_matrices(frame: VideoFrame) -> list[Matrix]:
    """Returns a frame's matrices: the container's, if it has one, then the codec's."""
    try:
        # `frame.side_data` would refer to the frame and the frame to it: such frames stay in memory
        # until the garbage collector runs, which counts objects and not their size.
        return [
            struct.unpack("9i", bytes(data))
            for data in cast(Iterable[SideData], SideDataContainer(frame))  # type: ignore[call-arg]
            if data.type is Type.DISPLAYMATRIX
        ]
    except ValueError:  # a kind of side data that PyAV does not know; the angle is readable
        turns = round(frame.rotation / 90) % 4
        one = 1 << 16
        a, b = ((one, 0), (0, -one), (-one, 0), (0, one))[turns]
        return [(a, b, 0, -b, a, 0, 0, 0, 1 << 30)] if turns else []


class OrientationTracker:
    """Finds the matrix of each frame of a decode.

    A message in the video stream (SEI) precedes the container's matrix. The codec gives it with
    some frames only. It holds until the next keyframe, and a keyframe without one has the message
    of the first frame. So the tracker must see the first frame of the video, and each keyframe
    before the frames that follow it.
    """

    def __init__(self) -> None:
        self._first: Matrix | None = None
        self._held: Matrix | None = None
        self._has_seen = self._has_container = False

    def matrix(self, frame: VideoFrame) -> Matrix | None:
        """Returns the matrix of the next frame in presentation order."""
        matrices = display_matrices(frame)
        self._has_container |= len(matrices) > 1
        # A single matrix is the container's, which every frame has, if there was a pair.
        is_message = len(matrices) > self._has_container
        message = matrices[-1] if is_message else None
        if not self._has_seen:
            self._has_seen, self._first = True, message
        if message is not None:
            self._held = message
        elif frame.key_frame:
            self._held = self._first
        if self._held is not None:
            return self._held
        return matrices[0] if matrices else None
