"""Small videos whose frames show their own frame number, and data sets packed from them."""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.packing.plan import PackSettings
from tvr.data_prep.records import Caption, Clip

BLOCK = 16


@functools.cache
def numbered_video(
    num_frames: int,
    *,
    first: int = 0,
    gop: int = 250,
    bframes: int = 2,
    faststart: bool = False,
    container: str = "mp4",
) -> bytes:
    """Returns an H.264 video, 64 x 32 pixels, 10 frames/s; frame i shows the number first + i."""
    options = {"movflags": "faststart"} if faststart else {}
    # libav reopens the file to move the index to its start.
    with tempfile.NamedTemporaryFile() as file:
        _encode(file.name, num_frames, first, gop, bframes, container, options)
        return Path(file.name).read_bytes()


def _encode(
    path: str,
    num_frames: int,
    first: int,
    gop: int,
    bframes: int,
    container: str,
    options: dict[str, str],
) -> None:
    with av.open(path, "w", format=container, options=options) as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 4 * BLOCK, 2 * BLOCK, "yuv420p"
        stream.options = {"g": str(gop), "bf": str(bframes), "preset": "veryfast"}
        stream.codec_context.thread_count = 1
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(number_picture(first + index), format="rgb24")
            frame.pts = index
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def number_picture(number: int) -> np.ndarray:
    """Returns (32, 64, 3) uint8: 4 x 2 blocks, white for set bits, the lowest bit top left."""
    bits = [(number >> bit) & 1 for bit in range(8)]
    blocks = np.array(bits, dtype=np.uint8).reshape(2, 4) * 255
    return np.repeat(np.kron(blocks, np.ones((BLOCK, BLOCK), np.uint8))[..., None], 3, axis=2)


def read_number(picture: np.ndarray) -> int:
    """Reads the number from a picture of `number_picture`, resized or not."""
    height, width = picture.shape[0] // 2, picture.shape[1] // 4
    blocks = [
        picture[row * height : (row + 1) * height, column * width : (column + 1) * width].mean()
        for row in range(2)
        for column in range(4)
    ]
    return sum(1 << bit for bit, value in enumerate(blocks) if value > 127)


def sound_only() -> bytes:
    """Returns an MP4 with one audio stream and no video."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 4096), dtype=np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def write_clips(folder: Path, num_clips: int, *, num_frames: int = 4) -> list[Clip]:
    """Writes clips c00, c01, ...; clip i shows numbers from 8 i on and has i % 3 + 1 captions."""
    clips = []
    for index in range(num_clips):
        path = folder / f"c{index:02d}.mp4"
        path.write_bytes(numbered_video(num_frames, first=8 * index % 256, bframes=0))
        captions = tuple(f"caption {number} of clip {index}" for number in range(index % 3 + 1))
        key = f"c{index:02d}"
        clips.append(Clip(key=key, video=str(path), captions=captions, video_id=key))
    return clips


def make_dataset(folder: Path, num_clips: int, **settings: Any) -> str:
    """Packs `write_clips` into folder/data with 5 samples a shard; returns the URL."""
    (folder / "videos").mkdir(parents=True)
    url = str(folder / "data")
    defaults = {"layout": "frames", "num_frames": 4, "samples_per_shard": 5}
    pack_shards(write_clips(folder / "videos", num_clips), url, **(defaults | settings))
    return url


def pack_settings(**changes: Any) -> PackSettings:
    """Settings of a packing of few small clips as frames."""
    values: dict[str, Any] = {
        "layout": "frames",
        "num_frames": 2,
        "short_side": None,
        "jpeg_quality": 90,
        "samples_per_shard": 4,
        "reencode": False,
        "keyframe_interval": 16,
        "words": False,
    }
    return PackSettings(**values | changes)


def file_contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def plain_captions(*texts: str) -> list[Caption]:
    """Returns captions without words."""
    return [Caption(text=text) for text in texts]


def tokenize(captions: Sequence[Caption]) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Tokenises a word to its length; pads to 8 tokens."""
    token_ids = torch.zeros(len(captions), 8, dtype=torch.long)
    for row, caption in enumerate(captions):
        lengths = [len(word) for word in caption.text.split()][:8]
        token_ids[row, : len(lengths)] = torch.tensor(lengths)
    return token_ids, (token_ids > 0).long()  # type: ignore[return-value]
