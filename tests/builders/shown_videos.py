"""Counter videos that a player shows otherwise than they are stored."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.filter import Graph
from av.stream import Disposition
from builders.counter_files import Encoding, number_of, picture

ONE = 1 << 16
# With B-frames, x265 gives the packets of so short a video decoding times at random.
X265_PARAMS = "log-level=none:pools=none:bframes=0"
Matrix = tuple[int, int, int, int, int, int, int, int, int]
# A transport stream that follows another one says so; otherwise packets seem to be lost.
MUXERS = {"mpegts": {"mpegts_flags": "initial_discontinuity"}}
Turn = Callable[[np.ndarray], np.ndarray]


def matrix_of(a: int, b: int, c: int, d: int, x: int = 0, y: int = 0) -> Matrix:
    """Returns the display matrix that shows a stored (x, y) at (a x + c y, b x + d y)."""
    return (a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, x * ONE, y * ONE, 1 << 30)


# The eight orientations: (a, b, c, d) of the matrix, and what it does to the stored picture.
ORIENTATIONS: dict[str, tuple[tuple[int, int, int, int], Turn]] = {
    "upright": ((1, 0, 0, 1), lambda p: p),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "flipped": ((1, 0, 0, -1), lambda p: p[::-1]),
    "half turn": ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    "clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "counter-clockwise": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    "other diagonal": ((0, -1, -1, 0), lambda p: p.swapaxes(0, 1)[::-1, ::-1]),
}
# The same as messages of an H.264 stream: counter-clockwise degrees, then a mirror.
MESSAGES: dict[str, tuple[str, Turn]] = {
    "mirrored": ("flip=horizontal", lambda p: p[:, ::-1]),
    "flipped": ("flip=vertical", lambda p: p[::-1]),
    "counter-clockwise": ("rotate=90", lambda p: np.rot90(p, 1)),
    "half turn": ("rotate=180", lambda p: p[::-1, ::-1]),
    "clockwise": ("rotate=270", lambda p: np.rot90(p, -1)),
}


def remux(
    content: bytes,
    container: str = "mp4",
    *,
    packet_filter: str = "",
    matrix: Matrix | None = None,
) -> bytes:
    """Copies a video's packets through a bit stream filter into a container with a matrix."""
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(content), "r") as source,
        av.open(buffer, "w", format=container, options=MUXERS.get(container, {})) as output,
    ):
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        if matrix is not None:
            copy.set_display_matrix(matrix)
        bits = BitStreamFilterContext(packet_filter, stream, copy) if packet_filter else None
        for packet in source.demux(stream):
            last = not packet.size
            for each in bits.filter(None if last else packet) if bits else [packet][last:]:
                each.stream = copy
                output.mux(each)
    return buffer.getvalue()


def with_message(content: bytes, text: str, container: str = "mp4") -> bytes:
    """Adds an orientation to the keyframes of an H.264 stream."""
    return remux(
        content, container, packet_filter=f"h264_metadata=display_orientation=insert:{text}"
    )


def with_pixel_shape(content: bytes, shape: str, container: str = "mp4") -> bytes:
    """Writes the shape of pixels, such as "16/9", to an H.264 stream and its container."""
    return remux(content, container, packet_filter=f"h264_metadata=sample_aspect_ratio={shape}")


def with_container_shape(content: bytes, width: int, height: int) -> bytes:
    """Patches the shape of pixels in an MP4 container; the H.264 stream keeps its own."""
    video = bytearray(remux(content))  # the copy's muxer writes the shape that the stream has
    at = video.index(b"pasp") + 4
    video[at : at + 8] = struct.pack(">II", width, height)
    return bytes(video)


def read_number(shown: np.ndarray) -> int:
    """Reads the number from an upright picture of any size."""
    return number_of(shown, Encoding(width=shown.shape[1], height=shown.shape[0]))


def undo(turn: Turn, shown: np.ndarray) -> np.ndarray:
    """Returns the shown picture as it was before one of the eight orientations."""
    again = turn(shown)
    while not np.array_equal(turn(again), shown):
        again = turn(again)
    return again


def make_interlaced(
    fields: Sequence[tuple[int, int]], *, top_first: bool, codec: str = "libx264"
) -> bytes:
    """Returns an interlaced video; each frame has the number of its top and its bottom field."""
    encoding = Encoding(width=64, height=96)
    order = "tff" if top_first else "bff"
    options = {"preset": "veryfast", "x264-params": f"interlaced=1:{order}=1:keyint=4"}
    if codec != "libx264":
        options = {"flags": "+ildct+ilme", "g": "4", "b": "4M"}
    buffer = io.BytesIO()
    graph = Graph()
    shape = {"width": 64, "height": 96, "format": "yuv420p", "time_base": Fraction(1, 25)}
    flags = graph.add("setfield", order), graph.add("buffersink")
    graph.link_nodes(graph.add_buffer(**shape), *flags).configure()
    with av.open(buffer, "w", format="mp4" if codec == "libx264" else "mpegts") as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.thread_count = 1
        for index, (top, bottom) in enumerate(fields):
            both = picture(top, encoding).copy()
            both[1::2] = picture(bottom, encoding)[1::2]
            frame = av.VideoFrame.from_ndarray(both, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            graph.vpush(frame.reformat(format="yuv420p"))  # black and white have no colours to mix
            output.mux(stream.encode(graph.vpull()))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def make_coloured(
    rgb: tuple[int, int, int],
    size: tuple[int, int],
    *,
    matrix: int,
    full: bool = False,
    tags: tuple[int, int, int, int] | None = None,
    codec: str = "libx264",
) -> bytes:
    """Returns an MP4 of one colour, stored with a matrix (swscale's number) and range.

    Args:
        tags: AVColorSpace, range, transfer and primaries that the video names; None = none.
    """
    buffer, (width, height) = io.BytesIO(), size
    x265 = {"x265-params": X265_PARAMS, "crf": "2", "preset": "ultrafast"}
    with av.open(buffer, "w", format="mp4") as output:
        options = {"qp": "1", "preset": "ultrafast"} if codec == "libx264" else x265
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        if tags is not None:
            context.colorspace, context.color_range, context.color_trc, context.color_primaries = (
                tags
            )
        for _ in range(2):
            flat = np.full((height, width, 3), rgb, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(flat, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=matrix, dst_color_range=2 if full else 1
            )
            if tags is None:
                frame.colorspace, frame.color_range = 2, 0
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def make_hdr(codes: np.ndarray, transfer: int) -> bytes:
    """Returns a 10-bit HEVC video of BT.2020 whose grey levels are `codes`, from 64 to 940."""
    buffer, width = io.BytesIO(), 32 * len(codes)
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream(
            "libx265",
            rate=25,
            options={
                "preset": "ultrafast",
                "crf": "4",
                "x265-params": f"{X265_PARAMS}:colormatrix=bt2020nc:range=limited:"
                f"transfer={'smpte2084' if transfer == 16 else 'arib-std-b67'}"
                ":colorprim=bt2020",
            },
        )
        stream.width, stream.height, stream.pix_fmt = width, 64, "yuv420p10le"
        stream.codec_context.thread_count = 1
        for _ in range(3):
            luma = np.repeat(codes, 32)[None].repeat(64, axis=0).astype(np.uint16)
            chroma = np.full((32, width), 512, dtype=np.uint16)
            content = np.concatenate([luma.reshape(-1, width), chroma.reshape(-1, width)])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(content, format="yuv420p10le")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def join(*parts: bytes, container: str) -> bytes:
    """Appends transport streams, as segments of a recording are joined, and copies the whole into
    a container. The parts' time stamps ascend."""
    whole = b"".join(parts)
    return whole if container == "mpegts" else remux(whole, container)


def with_picture(content: bytes, *, is_cover: bool) -> bytes:
    """Adds a larger stream of one picture before the video: a cover, or a track that looks like a
    video."""
    picture_file, buffer = io.BytesIO(), io.BytesIO()
    with av.open(picture_file, "w", format="mjpeg") as output:
        stream = output.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuvj420p"
        grey = av.VideoFrame.from_ndarray(np.full((240, 320, 3), 99, np.uint8), format="rgb24")
        output.mux(stream.encode(grey))
        output.mux(stream.encode(None))
    with (
        av.open(io.BytesIO(picture_file.getvalue()), "r", format="mjpeg") as cover,
        av.open(io.BytesIO(content), "r") as source,
        av.open(buffer, "w", format="mp4") as output,
    ):
        streams = [
            output.add_stream_from_template(each.streams.video[0]) for each in (cover, source)
        ]
        if is_cover:
            streams[0].disposition = Disposition.attached_pic
        for each, copy in zip((cover, source), streams, strict=True):
            for packet in each.demux(each.streams.video[0]):
                if packet.size:
                    packet.stream = copy
                    if each is cover:
                        packet.pts = packet.dts = 0
                    output.mux(packet)
    return buffer.getvalue()


def two_streams(
    sizes: Sequence[tuple[int, int]], firsts: Sequence[int], default: int | None
) -> bytes:
    """Returns a Matroska file with several video streams, each counting from its own number.

    Args:
        default: Stream that the container marks; None = no one.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska", options={"default_mode": "passthrough"}) as output:
        streams = []
        for number, (width, height) in enumerate(sizes):
            stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.thread_count = 1
            stream.codec_context.time_base = Fraction(1, 25)
            stream.disposition = int(number == default)
            streams.append(stream)
        for index in range(8):
            for stream, first in zip(streams, firsts, strict=True):
                encoding = Encoding(width=stream.width, height=stream.height)
                frame = av.VideoFrame.from_ndarray(picture(first + index, encoding), format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 25)
                output.mux(stream.encode(frame))
        for stream in streams:
            output.mux(stream.encode(None))
    return buffer.getvalue()
