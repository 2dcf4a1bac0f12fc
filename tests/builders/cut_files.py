"""Small videos in every container, with and without sound, to be cut short."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE, SOUND_RATE = 25, 48000


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """How a file is written."""

    muxer: str
    codec: str = "mpeg4"
    options: str = ""
    """Of the muxer, "name=value" each, with blanks between."""
    sound: str = ""
    """Codec of the sound; empty = none."""
    sound_s: float = 2.0
    size: tuple[int, int] = (96, 80)
    gop: int = 12
    bframes: int = 0


FRAGMENTS = "movflags=frag_keyframe+empty_moov"
SIZE_INDEX = "movflags=frag_keyframe+empty_moov+global_sidx"
KINDS = {
    "mp4": FileKind(muxer="mp4", codec="libx264", sound="aac", bframes=2),
    "mp4 list first": FileKind(muxer="mp4", sound="aac", options="movflags=faststart"),
    "mp4 fragments": FileKind(muxer="mp4", sound="aac", options=FRAGMENTS),
    "mp4 fragments with sizes": FileKind(muxer="mp4", options=SIZE_INDEX),
    "mov": FileKind(muxer="mov", sound="aac"),
    "matroska": FileKind(muxer="matroska", codec="libx264", sound="aac", bframes=2),
    "webm": FileKind(muxer="webm", codec="libvpx", sound="libopus"),
    "matroska live": FileKind(muxer="matroska", options="live=1"),
    "avi": FileKind(muxer="avi", sound="mp2"),
    "wmv": FileKind(muxer="asf", codec="wmv2", sound="mp2"),
    "flv": FileKind(muxer="flv", codec="flv", sound="aac"),
    "ogg": FileKind(muxer="ogg", codec="libvpx", sound="libopus"),
    "ts": FileKind(muxer="mpegts", codec="libx264", sound="mp2", bframes=2),
    "ts of mpeg2": FileKind(muxer="mpegts", codec="mpeg2video"),
    "m2ts": FileKind(muxer="mpegts", codec="libx264", options="mpegts_m2ts_mode=1"),
    "mpg": FileKind(muxer="vob", codec="mpeg2video", sound="mp2"),
    "mpg of mpeg1": FileKind(muxer="mpeg", codec="mpeg1video"),
    "mxf": FileKind(muxer="mxf", codec="mpeg2video", sound="pcm_s16le"),
    "nut": FileKind(muxer="nut"),
    "rm": FileKind(muxer="rm", codec="rv10", size=(176, 144)),
    "ivf": FileKind(muxer="ivf", codec="libvpx"),
    "gif": FileKind(muxer="gif", codec="gif", size=(64, 48)),
    "y4m": FileKind(muxer="yuv4mpegpipe", codec="rawvideo", size=(32, 32)),
    "h264": FileKind(muxer="h264", codec="libx264"),
    "mpeg2video": FileKind(muxer="mpeg2video", codec="mpeg2video"),
}


@functools.cache
def make_file(kind: FileKind, num_frames: int = 50) -> bytes:
    """Returns a video of moving noise, so that a picture has many bytes."""
    with tempfile.NamedTemporaryFile() as file:
        options = dict(option.split("=") for option in kind.options.split())
        with av.open(file.name, "w", format=kind.muxer, options=options) as output:
            _write(output, kind, num_frames)
        return Path(file.name).read_bytes()


def _write(output: av.container.OutputContainer, kind: FileKind, num_frames: int) -> None:
    x264 = {"preset": "veryfast", "x264-params": f"b-adapt=0:bframes={kind.bframes}"}
    quick = {"deadline": "realtime", "cpu-used": "8"}
    options = {"libx264": x264, "libvpx": quick}.get(kind.codec, {})
    video = output.add_stream(kind.codec, rate=RATE, options={"g": str(kind.gop), **options})
    video.width, video.height = kind.size
    video.pix_fmt = "rgb8" if kind.codec == "gif" else "yuv420p"
    video.codec_context.thread_count = 1
    sound = output.add_stream(kind.sound, rate=SOUND_RATE) if kind.sound else None
    draws = np.random.default_rng(0)
    noise = draws.integers(0, 255, (kind.size[1], kind.size[0], 3), dtype=np.uint8)
    tick, num_samples = 0, int(kind.sound_s * SOUND_RATE) if sound else 0
    step = (sound.codec_context.frame_size or 1024) if sound else 1
    for index in range(num_frames):
        while sound is not None and tick < min(num_samples, (index + 1) * SOUND_RATE // RATE):
            output.mux(sound.encode(_tone(sound, tick, step)))
            tick += step
        picture = np.roll(noise, 3 * index, axis=1)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=video.pix_fmt)
        frame.pts, frame.time_base = index, Fraction(1, RATE)
        output.mux(video.encode(frame))
    output.mux(video.encode(None))
    while sound is not None and tick < num_samples:
        output.mux(sound.encode(_tone(sound, tick, step)))
        tick += step
    if sound is not None:
        output.mux(sound.encode(None))


def _tone(sound: av.audio.stream.AudioStream, tick: int, step: int) -> av.AudioFrame:
    wave = np.sin(np.arange(tick, tick + step) / 20).astype(np.float32)
    shape = sound.codec_context.format.name
    layout = sound.codec_context.layout.name
    channels = sound.codec_context.layout.nb_channels
    if shape.startswith("flt"):
        samples = np.repeat(wave[None], channels, axis=0)
    else:
        samples = np.repeat((wave * 20000).astype(np.int16)[None], channels, axis=0)
    if not shape.endswith("p"):
        samples = samples.T.reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format=shape, layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, tick, Fraction(1, SOUND_RATE)
    return frame


def live_webm(num_frames: int = 50) -> bytes:
    """Returns a WebM as a browser records it: no size of the segment and its clusters, no
    duration."""
    content = bytearray(make_file(FileKind(muxer="webm", codec="libvpx", options="live=1")))
    at = content.find(bytes.fromhex("1f43b675"))
    while at >= 0:
        first = content[at + 4]
        length = 9 - first.bit_length()
        content[at + 4 : at + 4 + length] = bytes([0xFF >> (length - 1)]) + b"\xff" * (length - 1)
        at = content.find(bytes.fromhex("1f43b675"), at + 5)
    return bytes(content)
