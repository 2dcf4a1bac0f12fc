"""Writes samples to a tar shard in webdataset's format."""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from webdataset.writer import TarWriter

from tvr.data_prep.dataset.manifest import Shard
from tvr.data_prep.dataset.sample_table import SampleTable, text_array

# Two empty blocks end a tar archive.
END_OF_TAR = bytes(1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class TarSample:
    """A sample in the form that its shard stores."""

    key: str
    video_id: str
    stored: bytes
    """Tar members, from `tar_bytes`."""
    num_captions: int
    num_empty_captions: int = 0
    """Empty captions that packing dropped."""
    content: int
    """Hash of the clip's content, from `content_hash`."""
    adjusted: tuple[str, ...] = ()
    """What the clip's pictures needed to be shown, names in ADJUSTMENTS."""


class ShardWriter:
    """Writes one tar file on an fsspec file system; without samples it creates no file."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        self._path = path
        self._file: Any = None
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self._rows: list[tuple[str, str, int, int, int, int, int]] = []

    def append(self, sample: TarSample) -> None:
        """Appends one sample."""
        if self._file is None:
            self._file = self._fs.open(self._path, "wb")
        row = (
            *(sample.key, sample.video_id, self._num_bytes, len(sample.stored)),
            *(zlib.crc32(sample.stored), sample.num_captions, sample.content),
        )
        self._write(sample.stored)
        self._rows.append(row)

    def finish(self, name: str) -> tuple[Shard, SampleTable]:
        """Completes the file. Returns its description under its final name `name`, and its rows."""
        if self._file is not None:
            self._write(END_OF_TAR)
            if isinstance(self._fs, LocalFileSystem):
                self._file.flush()
                os.fsync(self._file.fileno())  # after a crash the renamed file must be whole
            self.close()
        shard = Shard(
            name=name,
            num_samples=len(self._rows),
            shard_bytes=self._num_bytes,
            sha256=self._digest.hexdigest(),
        )
        return shard, self._columns()

    def close(self) -> None:
        """Closes the file, even if it is incomplete."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _columns(self) -> SampleTable:
        columns = zip(*self._rows, strict=True) if self._rows else ((),) * 7
        key, video_id, offset, length, crc32, num_captions, content = columns
        return SampleTable(
            key=text_array(key),
            video_id=text_array(video_id),
            shard=np.zeros(len(self._rows), dtype=np.int32),
            offset=np.array(offset, dtype=np.int64),
            length=np.array(length, dtype=np.int64),
            crc32=np.array(crc32, dtype=np.uint32),
            num_captions=np.array(num_captions, dtype=np.int32),
            content=np.array(content, dtype=np.uint64),
        )

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._num_bytes += len(content)


def tar_bytes(key: str, members: dict[str, bytes]) -> bytes:
    """Returns the tar members of one sample, sorted, with a fixed date and owner.

    The blocks that end an archive are not included.
    """
    buffer = io.BytesIO()
    with TarWriter(buffer, user="tvr", group="tvr", mode=0o444, encoder=False, mtime=0) as writer:
        writer.write({"__key__": key, **members})
        length = writer.tarstream.offset
    return buffer.getvalue()[:length]


class ContentHash:
    """Hashes the clips of one source file, which is read through once, in parts or whole."""

    def __init__(self, source: bytes = b"") -> None:
        self._digest = hashlib.blake2b(source, digest_size=8)

    def update(self, part: bytes) -> None:
        """Adds the next bytes of the source."""
        self._digest.update(part)

    def of(self, span: tuple[float, float | None] | None) -> int:
        """Returns `content_hash` of the source and a cut range."""
        digest = self._digest.copy()
        if span is not None:
            start_s, end_s = span
            digest.update(struct.pack("<2d", start_s, math.inf if end_s is None else end_s))
        return int.from_bytes(digest.digest(), "little")


def content_hash(source: bytes, span: tuple[float, float | None] | None) -> int:
    """Returns a 64-bit hash of a clip's content: blake2b of the source file and the cut range.

    Args:
        span: Cut range in seconds; None = the whole source.
    """
    return ContentHash(source).of(span)
