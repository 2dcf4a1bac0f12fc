"""Indexes one archive of another tool in a single pass, and decodes each of its videos once."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from tvr.data_prep.annotations.clip_keys import hashed_key, name_hash
from tvr.data_prep.dataset.foreign_samples import ForeignRules, translate
from tvr.data_prep.dataset.foreign_tar import ForeignSample, sample_files
from tvr.data_prep.dataset.index_rules import MAX_SAMPLE_BYTES
from tvr.data_prep.dataset.manifest import Shard
from tvr.data_prep.dataset.sample_codec import parse_meta
from tvr.data_prep.dataset.sample_table import SampleTable, text_array
from tvr.data_prep.dataset.shard_writer import content_hash
from tvr.data_prep.packing.pack_clip import RefusedClip, describe_source
from tvr.data_prep.packing.shard_record import ShardFile, ShardRecord
from tvr.data_prep.records import MAX_KEY_LENGTH, BadSample
from tvr.data_prep.storage.storage import Storage
from tvr.data_prep.video.decode import check_frames

CHUNK_BYTES = 1 << 23
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignTar:
    """An archive to index."""

    name: str
    """File name in the folder."""
    num_bytes: int
    version: str
    """Changes with the file, see `VERSION_FIELDS`."""
    always_prefix: bool
    """Put the name of the archive before all keys, see `key_of_sample`."""

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".tar")


@dataclass(slots=True, kw_only=True)
class KnownSamples:
    """What earlier attempts at an archive found, by the offsets of its samples."""

    passed: set[int] = field(default_factory=set)
    """Videos that were decoded already."""
    refused: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Videos that must not be decoded again: reason, of BAD_SAMPLE_REASONS, and detail."""


class Watcher:
    """Sees what is done with an archive; this one has no use for it."""

    def read(self) -> None:
        """Bytes of the archive were read."""

    def begin(self, offset: int, num_bytes: int) -> None:
        """The sample at an offset is about to be read, and its video decoded."""

    def passed(self, offset: int) -> None:
        """The video was decoded without fault."""

    def refused(self, offset: int) -> None:
        """The video has a fault."""


class TarStream:
    """The bytes of an archive, read once by increasing offsets and hashed.

    Args:
        store: Storage of the folder.
        name: Name of the archive.
        num_bytes: Its size.
        on_read: Called after each read.
    """

    def __init__(
        self,
        store: Storage,
        name: str,
        num_bytes: int,
        on_read: Callable[[], object] = lambda: None,
    ) -> None:
        self._on_read = on_read
        self._store = store
        self._name = name
        self._num_bytes = num_bytes
        self._start = 0
        self._buffer = bytearray()
        self._digest = hashlib.sha256()

    def read(self, at: int, length: int) -> bytes:
        """Reads bytes, none of them released before; fewer at the end.

        Raises:
            ValueError: the file became shorter.
            OSError: see `Storage.read_range`.
        """
        end = min(at + length, self._num_bytes)
        while (fetched := self._start + len(self._buffer)) < end:
            content = self._store.read_range(
                self._name, fetched, min(max(end, fetched + CHUNK_BYTES), self._num_bytes)
            )
            if not content:
                raise ValueError(
                    f"{self._store.path(self._name)}: ends at byte {fetched}, had"
                    f" {self._num_bytes} when the folder was listed; repeat the command when"
                    " nothing writes there"
                )
            self._digest.update(content)
            self._buffer += content
            self._on_read()
        return bytes(self._buffer[at - self._start : max(at, end) - self._start])

    def release(self, at: int) -> None:
        """Lets go of the bytes before an offset."""
        del self._buffer[: at - self._start]
        self._start = max(at, self._start)

    def sha256(self) -> str:
        """Reads what is left. Returns the hash of the whole archive."""
        while (at := self._start + len(self._buffer)) < self._num_bytes:
            self.release(at)
            self.read(at, CHUNK_BYTES)
        return self._digest.hexdigest()


def index_tar(
    store: Storage,
    tar: ForeignTar,
    rules: ForeignRules,
    known: KnownSamples,
    watcher: Watcher,
) -> ShardRecord:
    """Returns the rows of an archive's good samples, and its bad ones.

    Args:
        known: What is known of the samples already.
        watcher: Sees the progress.

    Raises:
        ValueError: the archive changes while it is read.
        OSError: the storage fails.
    """
    stream = TarStream(store, tar.name, tar.num_bytes, watcher.read)
    rows: list[tuple[str, str, int, int, int, int, int]] = []
    bad: list[RefusedClip] = []
    offsets: dict[str, int] = {}
    if not tar.num_bytes:
        detail = f"the archive has no bytes [{tar.name}]"
        bad.append(RefusedClip(key=tar.stem, reason="unreadable", detail=detail))
    for sample in sample_files(stream.read, tar.num_bytes, stream.release):
        key = key_of_sample(sample.name, tar)
        try:
            row = _row(stream, sample, key, rules, offsets, known, watcher)
        except BadSample as error:
            where = f"{tar.name}: {sample.name or 'no file'}, byte {sample.start}"
            detail = f"{error.detail} [{where}]"
            bad.append(RefusedClip(key=key, reason=error.reason, detail=detail))
        else:
            rows.append(row)
            offsets[key] = sample.start
    sha256 = stream.sha256()
    files = ()
    if rows:
        shard = Shard(
            name=tar.name, num_samples=len(rows), shard_bytes=tar.num_bytes, sha256=sha256
        )
        num_captions = sum(row[5] for row in rows)
        files = (ShardFile(shard=shard, num_captions=num_captions, samples=_table(rows)),)
    return ShardRecord(files=files, num_empty_captions=0, bad=tuple(bad))


def _row(
    stream: TarStream,
    sample: ForeignSample,
    key: str,
    rules: ForeignRules,
    offsets: Mapping[str, int],
    known: KnownSamples,
    watcher: Watcher,
) -> tuple[str, str, int, int, int, int, int]:
    """Checks a sample. Returns its row, or raises BadSample."""
    start, length = sample.start, sample.end - sample.start
    if not sample.name:
        if start == 0 and stream.read(0, len(GZIP_MAGIC)) == GZIP_MAGIC:
            problem = "the archive is compressed, which hides its samples; decompress it"
            raise BadSample(key, "unreadable", problem)
        raise BadSample(key, "unreadable", sample.problem)
    if key in offsets:
        problem = f"a second sample of this name; the first begins at byte {offsets[key]}"
        raise BadSample(key, "unreadable", problem)
    if length > MAX_SAMPLE_BYTES:
        raise BadSample(key, "unreadable", f"{length} bytes, more than {MAX_SAMPLE_BYTES}")
    if start in known.refused:
        raise BadSample(key, *known.refused[start])
    if start not in known.passed:
        # Before the sample is in memory, so that one that does not fit is known by name.
        watcher.begin(start, length)
    content = stream.read(start, length)
    members = translate(sample, content, key, rules)
    meta = parse_meta(key, members)
    if start not in known.passed:
        try:
            check_video(members["mp4"], key)
        except BadSample as error:
            if error.reason == "out_of_memory":
                raise MemoryError(str(error)) from error
            watcher.refused(start)
            raise
        watcher.passed(start)
    return (
        *(key, meta.video_id, start, length, zlib.crc32(content), len(meta.captions)),
        content_hash(members["mp4"], None),
    )


def check_video(content: bytes, key: str) -> None:
    """Decodes every frame of a video once, as `tvr pack` does. Raises BadSample."""
    indices, _ = describe_source(content, key)
    check_frames(content, key=key, indices=indices)


def key_of_sample(name: str, tar: ForeignTar) -> str:
    """Returns the key of a sample, unique among all archives of a folder.

    It is the sample's name within its archive. The archive's name precedes it if it does not
    begin with that already, as the names of video2dataset and img2dataset do. A character that a
    key cannot have becomes "_". A key that was changed so, or that is too long, ends in a hash of
    the name.
    """
    full = name
    if tar.always_prefix or not name.startswith(tar.stem):
        full = f"{tar.stem}_{name}" if name else tar.stem
    key = re.sub(r"[^A-Za-z0-9_-]", "_", full)
    if key == full and len(key) <= MAX_KEY_LENGTH:
        return key
    return hashed_key(key, name_hash(full))


def always_prefix(names: Set[str]) -> bool:
    """True if the name of an archive begins with that of another one.

    A sample's name that begins with the archive's would not tell the archives apart then.
    """
    stems = sorted(name.removesuffix(".tar") for name in names)
    return any(later.startswith(first) for first, later in pairwise(stems))


def _table(rows: list[tuple[str, str, int, int, int, int, int]]) -> SampleTable:
    key, video_id, offset, length, crc32, num_captions, content = zip(*rows, strict=True)
    return SampleTable(
        key=text_array(key),
        video_id=text_array(video_id),
        shard=np.zeros(len(rows), dtype=np.int32),
        offset=np.array(offset, dtype=np.int64),
        length=np.array(length, dtype=np.int64),
        crc32=np.array(crc32, dtype=np.uint32),
        num_captions=np.array(num_captions, dtype=np.int32),
        content=np.array(content, dtype=np.uint64),
    )
