"""Frame sizes and JPEG: Pillow resizes and encodes, simplejpeg decodes.

Both use libjpeg-turbo and decode to the same pixels; simplejpeg needs 0.6 of the time.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

from tvr.data_prep.records import BadSample

MAX_PIXELS = 1 << 26
"""Pixels of a picture, such as 8192 x 8192; a few kilobytes can claim far more, and decoding them
takes gigabytes."""


def short_side_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Returns (width, height) scaled so that the shorter side is `short_side` pixels."""
    shorter = min(width, height)
    return max(1, round(width * short_side / shorter)), max(1, round(height * short_side / shorter))


def resize_short_side(frames: np.ndarray, short_side: int) -> np.ndarray:
    """Resizes frames (F, H, W, 3) uint8 to a shorter side of `short_side` pixels; bicubic,
    antialiased."""
    return resize(frames, *short_side_size(frames.shape[2], frames.shape[1], short_side))


def resize(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes frames (F, H, W, 3) uint8 to (F, height, width, 3); bicubic, antialiased."""
    if (height, width) == frames.shape[1:3]:
        return frames
    images = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    resized = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image) for image in resized])


def fit_square(frames: np.ndarray, image_size: int) -> np.ndarray:
    """Resizes the shorter side to `image_size` and crops the centre square."""
    frames = resize_short_side(frames, image_size)
    top = (frames.shape[1] - image_size) // 2
    left = (frames.shape[2] - image_size) // 2
    return np.ascontiguousarray(frames[:, top : top + image_size, left : left + image_size])


def encode_jpeg(frame: np.ndarray, quality: int) -> bytes:
    """Encodes one (H, W, 3) uint8 frame as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def decode_jpeg(
    content: bytes, *, key: str, member: str, out: np.ndarray | None = None
) -> np.ndarray:
    """Decodes a JPEG to (H, W, 3) uint8.

    Args:
        member: Tar member that the error names.
        out: Buffer that receives the picture if it has the picture's height and width.

    Raises:
        BadSample: "unreadable".
    """
    try:
        height, width = map(int, simplejpeg.decode_jpeg_header(content)[:2])
        if height * width > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
        if out is not None and (height, width) == out.shape[:2]:
            return simplejpeg.decode_jpeg(content, buffer=out)
        return simplejpeg.decode_jpeg(content)
    except ValueError as error:  # truncated, damaged, or another format
        raise BadSample(key, "unreadable", f"{member}: {error}") from error
