"""Writes samples into tar shards through webdataset's writer, under temporary names until all are
complete."""

from __future__ import annotations

import hashlib
import io
import math
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from webdataset.writer import TarWriter

from tvr.data_prep.manifest import Samples, Shard, join

PARTIAL = ".partial"
SHARD_PATTERN = re.compile(r"shard-\d{6,}\.tar")
# Two empty blocks end a tar archive.
END_OF_TAR = bytes(1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One line of the manifest's columns; see Samples."""

    key: str
    video_id: str
    shard: int
    offset: int
    length: int
    crc32: int
    num_captions: int
    content: int


class ShardWriter:
    """Fills one shard after another in the folder `root` of an fsspec file system."""

    def __init__(self, fs: Any, root: str, samples_per_shard: int) -> None:
        self.rows: list[SampleRow] = []
        self.shards: list[Shard] = []
        self._fs = fs
        self._root = root
        self._samples_per_shard = samples_per_shard
        self._file: Any = None
        self._digest = hashlib.sha256()
        self._offset = 0
        self._num_samples = 0

    def append(
        self,
        key: str,
        video_id: str,
        members: dict[str, bytes],
        *,
        num_captions: int,
        content: int,
    ) -> None:
        """Writes one sample; `members` by extension, `content` as of `content_hash`."""
        stored = tar_bytes(key, members)
        if self._file is None:
            self._file = self._fs.open(self._partial(len(self.shards)), "wb")
            self._digest, self._offset, self._num_samples = hashlib.sha256(), 0, 0
        row = SampleRow(
            key=key,
            video_id=video_id,
            shard=len(self.shards),
            offset=self._offset,
            length=len(stored),
            crc32=zlib.crc32(stored),
            num_captions=num_captions,
            content=content,
        )
        self._write(stored)
        self.rows.append(row)
        self._num_samples += 1
        if self._num_samples == self._samples_per_shard:
            self.end_shard()

    def end_shard(self) -> None:
        """Completes the open shard, if there is one."""
        if self._file is None:
            return
        self._write(END_OF_TAR)
        self.close()
        self.shards.append(
            Shard(
                name=f"shard-{len(self.shards):06d}.tar",
                num_samples=self._num_samples,
                shard_bytes=self._offset,
                sha256=self._digest.hexdigest(),
            )
        )

    def close(self) -> None:
        """Closes the open file, complete or not."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def publish(self) -> None:
        """Gives the complete shards their names."""
        for number, shard in enumerate(self.shards):
            self._fs.mv(self._partial(number), join(self._root, shard.name))

    def columns(self) -> Samples:
        """The rows written, as the manifest stores them."""
        return Samples(
            key=np.array([row.key for row in self.rows], dtype=np.str_),
            video_id=np.array([row.video_id for row in self.rows], dtype=np.str_),
            shard=np.array([row.shard for row in self.rows], dtype=np.int32),
            offset=np.array([row.offset for row in self.rows], dtype=np.int64),
            length=np.array([row.length for row in self.rows], dtype=np.int64),
            crc32=np.array([row.crc32 for row in self.rows], dtype=np.uint32),
            num_captions=np.array([row.num_captions for row in self.rows], dtype=np.int32),
            content=np.array([row.content for row in self.rows], dtype=np.uint64),
        )

    def _partial(self, number: int) -> str:
        return join(self._root, f"shard-{number:06d}.tar{PARTIAL}")

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._offset += len(content)


def tar_bytes(key: str, members: dict[str, bytes]) -> bytes:
    """The tar members of one sample, sorted, without date and owner, without the archive's end."""
    buffer = io.BytesIO()
    with TarWriter(buffer, user="tvr", group="tvr", mode=0o444, encoder=False, mtime=0) as writer:
        writer.write({"__key__": key, **members})
        length = writer.tarstream.offset
    return buffer.getvalue()[:length]


def content_hash(source: bytes, span: tuple[float, float | None] | None) -> int:
    """64 bits that tell what a clip shows: blake2b over the source file's bytes, and over the cut
    range in seconds where there is one."""
    digest = hashlib.blake2b(source, digest_size=8)
    if span is not None:
        start_s, end_s = span
        digest.update(struct.pack("<2d", start_s, math.inf if end_s is None else end_s))
    return int.from_bytes(digest.digest(), "little")


def remove_files(fs: Any, root: str, chosen: Callable[[str], bool]) -> None:
    """Removes the files of a folder whose names are chosen."""
    for path in fs.ls(root, detail=False):
        if chosen(path.rsplit("/", 1)[-1]):
            fs.rm_file(path)
