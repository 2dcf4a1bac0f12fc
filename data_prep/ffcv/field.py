"""FFCV field for a sample's JPEG frames, and its decoder.

FFCV's own JPEG decoder uses libjpeg-turbo's fast, inexact transform and ignores errors. This one
uses the exact transform of the same library, which gives the same pixels as simplejpeg and Pillow,
and reports the samples that it could not decode.

Importing this module requires FFCV, see `optional_import`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from ffcv.fields.base import ARG_TYPE, Field
from ffcv.fields.bytes import BytesDecoder
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from numba import njit, prange

from tvr.data_prep.dataset.jpeg_stack import stack_bytes

# All pointers are void pointers, because numba passes addresses as integers.
_void_p, _int, _ulong = ctypes.c_void_p, ctypes.c_int, ctypes.c_ulong
_turbojpeg = ctypes.CDLL("libturbojpeg.so.0")
_init = _turbojpeg.tjInitDecompress
_init.restype, _init.argtypes = _void_p, []
_decompress = _turbojpeg.tjDecompress2
_decompress.restype = _int
_decompress.argtypes = [_void_p, _void_p, _ulong, _void_p, _int, _int, _int, _int, _int]
_destroy = _turbojpeg.tjDestroy
_destroy.restype, _destroy.argtypes = _int, [_void_p]
_crc32 = ctypes.CDLL("libz.so.1").crc32
_crc32.restype, _crc32.argtypes = _ulong, [_ulong, _void_p, ctypes.c_uint]

_RGB, _EXACT = 0, 0  # TJPF_RGB; no flags = accurate integer transform, smooth upsampling


class JpegStackField(Field):
    """The JPEG frames of a sample, stored byte for byte as packed; all have the same size."""

    @property
    def metadata_type(self) -> np.dtype:
        return np.dtype(
            [
                ("ptr", "<u8"),
                ("size", "<u8"),
                ("frames", "<u4"),
                ("height", "<u4"),
                ("width", "<u4"),
            ]
        )

    @staticmethod
    def from_binary(binary: Any) -> JpegStackField:
        return JpegStackField()

    def to_binary(self) -> Any:
        return np.zeros(1, dtype=ARG_TYPE)[0]

    def encode(self, destination: Any, field: Any, malloc: Any) -> None:  # type: ignore[override]
        """Writes one sample.

        Args:
            destination: Metadata row to fill.
            field: (JPEGs, height, width); the decoder skips a sample of 0 x 0 pixels.
            malloc: FFCV's allocator.
        """
        jpegs, height, width = field
        content = stack_bytes(jpegs)
        ptr, buffer = malloc(len(content))
        buffer[:] = np.frombuffer(content, dtype=np.uint8)
        for name, value in (
            ("ptr", ptr),
            ("size", len(content)),
            ("frames", len(jpegs)),
            ("height", height),
            ("width", width),
        ):
            destination[name] = value

    def get_decoder_class(self) -> type[Operation]:
        return JpegStackDecoder


class JpegStackDecoder(Operation):
    """Decodes n samples to (frames (n, bytes) uint8, crc32 (n,), is_decoded (n,) bool).

    A row of `frames` holds a sample's (F, H, W, 3) pixels, zero-padded. Each batch gets newly
    allocated memory, because FFCV reuses its own buffers while a batch is still in use.
    """

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        sizes = [self.metadata[name].astype(np.int64) for name in ("frames", "height", "width")]
        self._row_bytes = int(3 * np.prod(sizes, axis=0).max())
        return replace(previous_state, jit_mode=True, shape=(self._row_bytes,)), None

    def generate_code(self) -> Callable:
        row_bytes = self._row_bytes

        def decode(rows: Any, _: None, metadata: Any, state: Any) -> Any:
            return _decode_rows(rows, metadata, state[0], row_bytes)

        return decode


class TextDecoder(BytesDecoder):
    """Copies the bytes (n, bytes) uint8 of n samples into newly allocated memory."""

    def declare_state_and_memory(self, previous_state: State) -> Any:
        self._row_bytes = int(self.metadata["size"].max())
        return replace(previous_state, jit_mode=True, shape=(self._row_bytes,)), None

    def generate_code(self) -> Callable:
        row_bytes = self._row_bytes

        def decode(rows: Any, _: None, metadata: Any, state: Any) -> Any:
            return _copy_rows(rows, metadata, state[0], row_bytes)

        return decode


@njit(nogil=True, parallel=True)
def _decode_rows(rows, metadata, file, row_bytes):  # type: ignore[no-untyped-def]
    frames = np.empty((len(rows), row_bytes), dtype=np.uint8)
    crc32 = np.zeros(len(rows), dtype=np.uint32)
    is_decoded = np.zeros(len(rows), dtype=np.bool_)
    for i in prange(len(rows)):
        row = metadata[rows[i]]
        start, size = np.int64(row["ptr"]), np.int64(row["size"])
        if 0 <= start and 0 <= size and start + size <= file.size:
            crc32[i] = _crc32(0, file.ctypes.data + start, size)
            count, height, width = np.int64(row["frames"]), row["height"], row["width"]
            is_decoded[i] = _decode_stack(
                file, start, size, count, np.int64(height), np.int64(width), frames[i]
            )
    return frames, crc32, is_decoded


@njit(nogil=True)
def _copy_rows(rows, metadata, file, row_bytes):  # type: ignore[no-untyped-def]
    texts = np.empty((len(rows), row_bytes), dtype=np.uint8)
    for i in range(len(rows)):
        start, size = np.int64(metadata[rows[i]]["ptr"]), np.int64(metadata[rows[i]]["size"])
        if 0 <= start and 0 <= size <= row_bytes and start + size <= file.size:
            texts[i, :size] = file[start : start + size]
    return texts


# Inlined: as a separate function, numba 0.68 compiles it for the first beton and fails with a
# KeyError for a second beton of other sizes in the same process.
@njit(nogil=True, inline="always")
def _decode_stack(file, start, size, count, height, width, out):  # type: ignore[no-untyped-def]
    frame_bytes = 3 * height * width
    at = start + 4 * (count + 1)
    if not 0 < count * frame_bytes <= out.size or at > start + size:
        return False
    out[count * frame_bytes :] = 0
    decoder = _init()
    result = 0
    for index in range(count):
        length = _uint32(file, start + 4 * (index + 1))
        if at + length > start + size:
            result = -1
        if result == 0:
            source, target = file.ctypes.data + at, out.ctypes.data + index * frame_bytes
            result = _decompress(decoder, source, length, target, width, 0, height, _RGB, _EXACT)
        at += length
    _destroy(decoder)
    return result == 0


@njit(nogil=True, inline="always")
def _uint32(file, at):  # type: ignore[no-untyped-def]
    value = np.int64(0)
    for index in range(4):
        value += np.int64(file[at + index]) << (8 * index)
    return value
