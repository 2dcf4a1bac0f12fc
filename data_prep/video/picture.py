"""Turns decoded frames into the pictures that a player shows.

A picture is upright, its pixels are square, its lines are of one time, and its colours are those of
the standard range. data_prep/README.md has the rules. A frame that needs none of this is converted
to RGB and nothing else.
"""

from __future__ import annotations

import logging
from fractions import Fraction
from os import PathLike

import av.error
import numpy as np
from av.container import InputContainer
from av.filter.graph import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from tvr.data_prep.containers.boxes import has_pixel_shape
from tvr.data_prep.containers.elements import mapped
from tvr.data_prep.records import BadSample
from tvr.data_prep.video.images import MAX_PIXELS, resize
from tvr.data_prep.video.orientation import (
    UPRIGHT,
    Orientation,
    OrientationTracker,
    orientation_of,
    shape_in_matrix,
)
from tvr.data_prep.video.parameter_sets import has_orientation
from tvr.data_prep.video.tone_map import HDR_TRANSFERS, tone_map

log = logging.getLogger(__name__)

SQUARE = Fraction(1)
MOST_UNEQUAL = 8
"""Largest ratio of a pixel's sides. Real ones are below 3; more is taken for a damaged value."""
SAME_ASPECT = 0.02
"""Relative difference of two aspect ratios below which a picture is stretched instead of framed."""

# AVColorSpace: the matrices that swscale knows. Others are treated as if there were no tag.
SPECIFIED = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}


class PicturePainter:
    """Converts the frames of one decode; `open` first, then `see` each frame in order."""

    def __init__(self, key: str) -> None:
        self.adjusted: set[str] = set()
        """Names in ADJUSTMENTS of what the pictures so far needed."""
        self._key = key
        self._scaler = VideoReformatter()  # one per frame would take four times as long
        self._tracker = OrientationTracker()
        self._orientation = UPRIGHT
        self._shape = SQUARE

    def open(
        self,
        container: InputContainer,
        stream: VideoStream,
        *,
        source: bytes | str | PathLike[str] = b"",
        skips_first: bool = False,
    ) -> None:
        """Starts with a container that was just opened.

        Args:
            source: The opened file; it is read only if the shape of pixels changes midway.
            skips_first: The first frame will not be seen. A seek follows, so its packet is read
                here, and decoded if it says how the video is turned.
        """
        self._stream = stream
        self._opened_shape = stream.codec_context.sample_aspect_ratio
        self._shape_of_all = stream.sample_aspect_ratio
        self._source = source
        names = container.format.name.split(",")
        self._is_mp4 = "mov" in names
        if self._is_mp4 and self._differs_by_rounding():
            self._shape_of_all = self._opened_shape
        # libav prefers the container's shape to the codec's, and does not tell which one it is.
        # Matroska always has one.
        self._container_decides = self._shape_of_all is not None and (
            self._shape_of_all != self._opened_shape or "matroska" in names
        )
        self._shape_changes = False
        if skips_first:
            packet = next(iter(container.demux(stream)))
            if packet.size and has_orientation(packet, stream.codec_context):
                for frame in [*stream.decode(packet), *stream.decode(None)][:1]:
                    self._tracker.matrix(frame)
                stream.codec_context.flush_buffers()

    def see(self, frame: VideoFrame) -> None:
        """Notes how the next frame is turned. Keyframes must be seen, others may be left out."""
        matrix = self._tracker.matrix(frame)
        self._orientation = orientation_of(matrix)
        shape = self._frame_shape(frame)
        if shape is None or shape == 1:
            self._shape = SQUARE
            return
        scale = None if matrix is None else shape_in_matrix(matrix)
        # A shape that libav computed from the matrix is for the shown picture, not the stored one.
        if scale is not None and abs(shape / scale[1] - 1) < Fraction(1, 100):
            shape = scale[0]
        is_sane = Fraction(1, MOST_UNEQUAL) <= shape <= MOST_UNEQUAL
        self._shape = shape if is_sane else SQUARE

    @property
    def orientation(self) -> Orientation:
        """Orientation of the frame that was seen last."""
        return self._orientation

    @property
    def pixel_shape(self) -> Fraction:
        """Width / height of a pixel of the frame that was seen last."""
        return self._shape

    def note(self, frame: VideoFrame) -> None:
        """Adds what the frame that was seen last needs to `adjusted`."""
        if self._orientation != UPRIGHT:
            self.adjusted.add("turned")
        if self._shape is not SQUARE:
            self.adjusted.add("reshaped")
        if frame.interlaced_frame:
            self.adjusted.add("deinterlaced")
        if frame.color_trc in HDR_TRANSFERS:
            self.adjusted.add(HDR_TRANSFERS[frame.color_trc])

    def picture(self, frame: VideoFrame) -> np.ndarray:
        """Returns the frame that was seen last as (H, W, 3) uint8 RGB, as a player shows it.

        Raises BadSample("unreadable") if libav cannot convert it.
        """
        self.note(frame)
        picture = self._rgb(self.progressive(frame))
        if self._shape is not SQUARE:
            width, height = self.square_size(frame)
            picture = resize(picture[None], width, height)[0]
        return self._orientation.apply(picture)

    def progressive(self, frame: VideoFrame) -> VideoFrame:
        """Returns the frame with the lines of its first field only, the others interpolated."""
        if not frame.interlaced_frame:
            return frame
        try:
            return _deinterlace(frame)
        except av.error.FFmpegError as error:
            raise self._unreadable(error) from error

    def square_size(self, frame: VideoFrame) -> tuple[int, int]:
        """Returns (width, height) of the frame with square pixels, before any turn."""
        width = max(1, round(frame.width * self._shape))
        if width * frame.height > MAX_PIXELS:
            size = f"{width} x {frame.height} pixels"
            raise BadSample(self._key, "unreadable", f"pictures of {size}, more than {MAX_PIXELS}")
        return width, frame.height

    def reformat(
        self,
        frame: VideoFrame,
        size: tuple[int, int] | None = None,
        pixels: str = "rgb24",
        to: Colorspace | None = None,
    ) -> VideoFrame:
        """Converts a frame's size and pixel format, from the colours that `color_matrix` gives.

        Args:
            to: Matrix of the result, limited range; None = the result is RGB.
        """
        matrix = color_matrix(frame)
        has_matrix_tag = frame.colorspace in SPECIFIED
        try:
            return self._scaler.reformat(
                frame,
                *(size or (frame.width, frame.height)),
                format=pixels,
                src_colorspace=None if has_matrix_tag or matrix is None else matrix,
                dst_colorspace=to,
                dst_color_range=None if to is None else ColorRange.MPEG,
                interpolation=None if size is None else "BICUBIC",
                threads=1,
            )
        except (av.error.FFmpegError, ValueError) as error:
            raise self._unreadable(error) from error

    def _rgb(self, frame: VideoFrame) -> np.ndarray:
        if frame.color_trc not in HDR_TRANSFERS:
            return self.reformat(frame).to_ndarray()
        coded = self.reformat(frame, pixels="rgb48le").to_ndarray()
        return tone_map(coded, frame.color_trc, frame.color_primaries)

    def _unreadable(self, error: Exception) -> BadSample:
        if isinstance(error, MemoryError):
            return BadSample(self._key, "out_of_memory", "no memory to convert a frame")
        return BadSample(self._key, "unreadable", f"a frame cannot be converted: {error}")

    def _frame_shape(self, frame: VideoFrame) -> Fraction | None:
        if not self._shape_changes and not self._container_decides:
            if self._stream.codec_context.sample_aspect_ratio != self._opened_shape:
                self._container_decides = self._is_mp4 and self._has_box_for_shape()
                self._shape_changes = not self._container_decides
        # The decoder may be ahead of this frame, so its own value is asked for.
        if not self._shape_changes:
            return self._shape_of_all
        try:
            return _measure_shape(frame)
        except av.error.FFmpegError as error:
            raise self._unreadable(error) from error

    def _differs_by_rounding(self) -> bool:
        """True if the shape is of an MP4 track's size, which libav rounds down to whole pixels."""
        width, own, shape = self._stream.width, self._opened_shape, self._shape_of_all
        return bool(own and shape) and abs(own - shape) * width < 1

    def _has_box_for_shape(self) -> bool:
        with mapped(self._source) as content:
            return has_pixel_shape(content, self._stream.id)


def color_matrix(frame: VideoFrame) -> Colorspace | None:
    """Returns the matrix of a frame's colours; None = its pixels are RGB.

    Without a tag it is BT.2020 for PQ and HLG, else BT.709 from 1280 pixels of width or more than
    576 of height, and BT.601 below: the rule of the player mpv.
    """
    if frame.format.is_rgb or frame.format.has_palette:
        return None
    if frame.colorspace in SPECIFIED:
        return SPECIFIED[frame.colorspace]
    if frame.color_trc in HDR_TRANSFERS:
        return Colorspace.BT2020
    return untagged_matrix(frame.width, frame.height)


def untagged_matrix(width: int, height: int) -> Colorspace:
    """Returns the matrix of a picture without a tag."""
    return Colorspace.ITU709 if width >= 1280 or height > 576 else Colorspace.ITU601


def fit_picture(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes (H, W, 3) to a size, whole, between black bars if its aspect ratio is another."""
    if picture.shape[:2] == (height, width):
        return picture
    scale = min(width / picture.shape[1], height / picture.shape[0])
    inner = (
        min(width, max(1, round(picture.shape[1] * scale))),
        min(height, max(1, round(picture.shape[0] * scale))),
    )
    if abs(picture.shape[1] * height / (picture.shape[0] * width) - 1) < SAME_ASPECT:
        inner = (width, height)
    framed = np.zeros((height, width, 3), dtype=np.uint8)
    top, left = (height - inner[1]) // 2, (width - inner[0]) // 2
    framed[top : top + inner[1], left : left + inner[0]] = resize(picture[None], *inner)[0]
    return framed


_warned: set[str] = set()


def warn_once(about: str, text: str) -> None:
    """Logs a warning, the first one about something in this process."""
    if about not in _warned:
        _warned.add(about)
        log.warning("%s", text)


def _deinterlace(frame: VideoFrame) -> VideoFrame:
    """Keeps the field that is first in time and interpolates the other's lines along edges.

    The result depends on this frame alone, so a sampled frame is the same after any seek.
    """
    pts = frame.pts
    # The frame's own time stamp would be the filter's first; it does not matter there.
    graph = _graph(frame, "estdif", "mode=frame:parity=auto:deint=all")
    graph.vpush(frame)
    graph.vpush(None)
    progressive = graph.vpull()
    progressive.pts = pts
    if frame.time_base is not None:  # a frame of a decoder that no container feeds has none
        progressive.time_base = frame.time_base
    return progressive


def _measure_shape(frame: VideoFrame) -> Fraction:
    """Reads the shape of a frame's pixels, which PyAV does not show, through a filter's result."""
    steps = 1 << 14
    graph = _graph(frame, "scale", f"w=clip(round(sar*{steps})\\,1\\,{32 * steps}):h=2:eval=frame")
    graph.vpush(frame)
    return Fraction(graph.vpull().width, steps).limit_denominator(255)


def _graph(frame: VideoFrame, name: str, arguments: str) -> Graph:
    graph = Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base=str(frame.time_base or Fraction(1, 25)),
        pixel_aspect="1/1",
        colorspace=str(int(frame.colorspace)),
        range=str(int(frame.color_range)),
    )
    graph.link_nodes(source, graph.add(name, arguments), graph.add("buffersink"))
    graph.configure()
    return graph
