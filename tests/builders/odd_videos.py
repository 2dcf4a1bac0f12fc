"""Videos as people have them: the contents of the files of `odd_files`.

Each frame shows its number. All are a few kilobytes and made in milliseconds.
"""

from __future__ import annotations

import io
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from builders.counter_files import Encoding, make_video, picture
from builders.shown_videos import X265_PARAMS

NUM_FRAMES = 6
X264 = {"preset": "ultrafast", "g": "4", "bf": "1"}
X265 = {"preset": "ultrafast", "x265-params": X265_PARAMS}
VP = {"deadline": "realtime", "cpu-used": "8"}
PLAIN = {"preset": "ultrafast", "tune": "zerolatency"}


def encode(
    container: str,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    *,
    frames: int = NUM_FRAMES,
    first: int = 0,
    size: tuple[int, int] = (64, 48),
    rate: int = 25,
    options: Mapping[str, str] | None = None,
    muxer: Mapping[str, str] | None = None,
    with_sound: bool = False,
) -> bytes:
    """Returns a video at a constant rate; frame i shows first + i."""
    os.environ.setdefault("SVT_LOG", "1")  # libsvtav1 prints errors only
    defaults = {"libx264": X264, "libx265": X265, "libvpx": VP, "libvpx-vp9": VP}
    encoding = Encoding(width=size[0], height=size[1])
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=container, options=dict(muxer or {})) as output:
            chosen = dict(defaults.get(codec, {}) if options is None else options)
            stream = output.add_stream(codec, rate=rate, options=chosen)
            stream.width, stream.height, stream.pix_fmt = *size, pixels
            stream.codec_context.thread_count = 1
            sound = output.add_stream("aac", rate=8000) if with_sound else None
            for index in range(frames):
                shown = picture(first + index, encoding)
                frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
                if pixels == "yuva420p":  # half transparent
                    alpha = np.full((*shown.shape[:2], 1), 200, np.uint8)
                    rgba = np.concatenate([shown, alpha], axis=2)
                    frame = av.VideoFrame.from_ndarray(rgba, format="rgba")
                frame.pts, frame.time_base = index, Fraction(1, rate)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
            if sound is not None:
                silence = np.zeros((1, 1024), dtype=np.float32)
                audio = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
                audio.sample_rate, audio.pts = 8000, 0
                output.mux(sound.encode(audio))
                output.mux(sound.encode(None))
        return Path(file.name).read_bytes()


def timed(container: str, ticks: Sequence[int], *, shift: int = 0) -> bytes:
    """Returns a video whose frames have these milliseconds."""
    return make_video(
        Encoding(
            frames=len(ticks), options=X264, container=container, ticks=tuple(ticks), shift=shift
        )
    )


def repeated_stamp_in_mp4() -> bytes:
    """Returns an MP4 of which two frames have the same time stamp."""
    content = bytearray(
        make_video(Encoding(frames=NUM_FRAMES, options=PLAIN, ticks=(0, 40, 80, 81, 160, 200)))
    )
    at = content.index(b"stts") + 4
    (count,) = struct.unpack_from(">I", content, at + 4)
    entries = [at + 8 + 8 * number for number in range(count)]
    shortest = min(entries, key=lambda entry: struct.unpack_from(">I", content, entry + 4))
    struct.pack_into(">I", content, shortest + 4, 0)
    return bytes(content)


def restamped(container: str, stamps: Sequence[int]) -> bytes:
    """Returns a video without B-frames whose packets have these stamps, in units of 40 ms."""
    source = encode("matroska", options=PLAIN, frames=len(stamps))
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(source), "r") as read,
        av.open(buffer, "w", format=container) as output,
    ):
        copy = output.add_stream_from_template(read.streams.video[0])
        packets = [packet for packet in read.demux(read.streams.video[0]) if packet.size]
        for packet, stamp in zip(packets, stamps, strict=True):
            packet.stream = copy
            packet.pts = packet.dts = stamp * 40
            packet.time_base = Fraction(1, 1000)
            output.mux(packet)
    return buffer.getvalue()


def half(content: bytes, share: float = 0.5) -> bytes:
    """Returns the first part of a file."""
    return content[: int(len(content) * share)]


def damaged_middle(content: bytes, mark: bytes = b"mdat") -> bytes:
    """Returns a file with noise in the middle of what follows `mark`."""
    start = content.index(mark)
    at = start + (len(content) - start) // 3
    noise = np.random.default_rng(0).bytes(120)
    return content[:at] + noise + content[at + 120 :]


def sound_and_cover() -> bytes:
    """Returns an audio file with a cover picture."""
    cover, buffer = io.BytesIO(), io.BytesIO()
    with av.open(cover, "w", format="mjpeg") as output:
        stream = output.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        grey = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, np.uint8), format="rgb24")
        output.mux(stream.encode(grey))
        output.mux(stream.encode(None))
    with (
        av.open(io.BytesIO(cover.getvalue()), "r", format="mjpeg") as source,
        av.open(buffer, "w", format="mp4") as output,
    ):
        copy = output.add_stream_from_template(source.streams.video[0])
        copy.disposition = Disposition.attached_pic
        sound = output.add_stream("aac", rate=8000)
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream, packet.pts, packet.dts = copy, 0, 0
                output.mux(packet)
        silence = np.zeros((1, 4096), dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 8000
        output.mux(sound.encode(frame))
        output.mux(sound.encode(None))
    return buffer.getvalue()


def picture_file(kind: str) -> bytes:
    """Returns a still or animated picture: PNG, JPEG, WEBP or TIFF."""
    from PIL import Image

    shown = [Image.fromarray(picture(number, Encoding())) for number in range(NUM_FRAMES)]
    buffer = io.BytesIO()
    more = {"save_all": True, "append_images": shown[1:]} if kind == "WEBP" else {}
    shown[0].save(buffer, format=kind, **more)
    return buffer.getvalue()


def claims_huge_pictures() -> bytes:
    """Returns a GIF of a few bytes whose header says 65535 x 65535 pixels."""
    content = bytearray(encode("gif", "gif", "rgb8", rate=10))
    content[6:10] = struct.pack("<2H", 65535, 65535)
    return bytes(content)


def raw_frames() -> bytes:
    """Returns frames without any header."""
    frames = [
        av.VideoFrame.from_ndarray(picture(number, Encoding()), format="rgb24").reformat(
            format="yuv420p"
        )
        for number in range(NUM_FRAMES)
    ]
    return b"".join(frame.to_ndarray().tobytes() for frame in frames)


def without_packets() -> bytes:
    """Returns an MP4 that names a video stream and holds no frame: an initialisation segment."""
    whole = encode("mp4", muxer={"movflags": "frag_keyframe+empty_moov"})
    return whole[: whole.index(b"moof") - 4]
