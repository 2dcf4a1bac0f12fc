"""Random access to packed samples: a byte range of a shard, checked, then parsed by webdataset."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_iterator

from tvr.data_prep.ahead import ShardsAhead
from tvr.data_prep.decode import sample_frames
from tvr.data_prep.decoders import Decoder, SampleFrames, frame_sampler
from tvr.data_prep.frame_choice import segment_frames
from tvr.data_prep.images import decode_jpeg, fit_square
from tvr.data_prep.jpeg_stack import split_stack, stack_names
from tvr.data_prep.manifest import Manifest, read_manifest
from tvr.data_prep.records import BadSample, Caption, Sample, Word, WordKind
from tvr.data_prep.shard_cache import CacheFolder, ShardCache
from tvr.data_prep.store import Store
from tvr.data_prep.views import View, crop_box, crop_frames

MAX_OPEN_SHARDS = 64
# In evaluation, where the next shard is read when this one is done.
SHARDS_AHEAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleMeta:
    """A sample less its pictures."""

    captions: tuple[Caption, ...]
    video_id: str
    frame_times_s: tuple[float, ...]
    """Of the stored JPEG frames; empty in the video layout."""
    jpegs: tuple[str, ...]
    """Names of the JPEG members in order."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The captions without their words."""
        return tuple(caption.text for caption in self.captions)


class SampleReader:
    """Reads any sample of a data set by its manifest row; one per process, made before or after a
    fork."""

    def __init__(
        self,
        url: str,
        *,
        num_frames: int,
        image_size: int,
        decoder: Decoder = "pyav",
        cache_bytes: int = 0,
        shard_cache: CacheFolder | None = None,
    ) -> None:
        """`decoder` is for the video layout. `cache_bytes` > 0 keeps that many bytes of decoded
        frames per process, least recently used out first: as `read` returns them or, where samples
        are read by views, as they are stored. Worth it where a data set fits: 400 clips of 6 JPEG
        frames of 48 x 48 came at 14,000 a second instead of 600, in one process on a 2-core
        machine. `shard_cache` keeps whole shards of a remote data set on a local disk; a local data
        set needs none.

        Raises ValueError for sizes the data set cannot give, as `frame_sampler`, and as
        `read_manifest`.
        """
        self.manifest = read_manifest(url)
        stored = self.manifest.num_frames
        if num_frames < 1 or image_size < 1:
            raise ValueError(
                f"num_frames={num_frames} and image_size={image_size} must be at least 1"
            )
        if self.manifest.layout == "frames" and num_frames > stored:
            raise ValueError(
                f"num_frames={num_frames} must be from 1 to {stored}, the frames stored per sample"
                f" in {url}; pack again with a larger --num-frames to use more"
            )
        self.url = url
        self.num_frames = num_frames
        self.image_size = image_size
        self._files = _ShardFiles(url, self.manifest, shard_cache)
        self._sample_frames = frame_sampler(decoder)
        if self.manifest.beton is not None:
            cache_bytes = 0  # FFCV decodes every batch anew
        self._cache = SampleCache(cache_bytes)
        self._keeps_samples = cache_bytes > 0
        self._held: dict[int, tuple[bytes, np.ndarray]] = {}
        self.room: Tensor | None = None
        """Where the frames of the batch being read may lie."""
        self._places: Iterator[np.ndarray] = iter(())

    def __len__(self) -> int:
        return self.manifest.num_samples

    def key(self, row: int) -> str:
        """The key of a manifest row."""
        return str(self.manifest.samples.key[row])

    @property
    def fetches_ahead(self) -> bool:
        """Whether shards are kept here, with room for those that come next."""
        return self._files.ahead is not None

    def next_shards(self, row: int, end: int) -> tuple[int, ...]:
        """The shards read after that of a row, where rows are read in order up to `end`."""
        shards = self.manifest.samples.shard
        here, last = int(shards[row]), int(shards[end - 1])
        return tuple(range(here + 1, min(here + SHARDS_AHEAD, last) + 1))

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Fetches shards in the background; they are needed soon."""
        if self._files.ahead is not None:
            self._files.ahead.want(shards)

    def make_room(self, count: int) -> None:
        """Lets the frames of the next `count` samples be decoded to where a batch of them lies, if
        they are stored in its size."""
        if self.manifest.layout == "frames" and not self._keeps_samples:
            shape = (count, self.num_frames, self.image_size, self.image_size, 3)
            self.room = shared_between_processes(shape)
            self._places = iter(self.room.numpy())

    def hold(self, decoded: dict[int, tuple[bytes, np.ndarray]], room: Tensor | None) -> None:
        """Takes samples that somebody else read, checked and decoded: the JSON and all stored
        frames by row, instead of those held before; `room` is where they lie."""
        self._held, self.room, self._places = decoded, room, iter(())

    def read(self, row: int, view: View | None = None) -> Sample:
        """Frames at (num_frames or fewer, image_size, image_size, 3): those a view shows, or the
        middle ones' squares at the centre. Raises BadSample.

        One reader is asked for views always or never: what it keeps is of one kind.
        """
        kept = self._cache.get(row)
        if kept is None:
            kept = self._load(row, view)
            self._cache.put(row, kept)
        return kept if view is None else self._shown(kept, view)

    def decode(
        self, row: int, num_frames: int, offsets: Sequence[float] | None
    ) -> tuple[SampleMeta, np.ndarray, tuple[float, ...]]:
        """A sample's frames (num_frames or fewer, H, W, 3) as stored, those that `segment_frames`
        names, with their times. Raises BadSample."""
        key = self.key(row)
        if row in self._held:
            return self._chosen(key, *self._held[row], num_frames, offsets)
        members = self.members(row)
        meta = parse_meta(key, members)
        return meta, *decode_members(
            key,
            members,
            meta,
            num_frames,
            offsets=offsets,
            sample=self._sample_frames,
            place=next(self._places, None),
        )

    def _chosen(
        self,
        key: str,
        text: bytes,
        frames: np.ndarray,
        num_frames: int,
        offsets: Sequence[float] | None,
    ) -> tuple[SampleMeta, np.ndarray, tuple[float, ...]]:
        meta = parse_meta(key, {"json": text, **dict.fromkeys(stack_names(len(frames)), b"")})
        chosen = segment_frames(len(frames), num_frames, offsets)
        if len(frames) > num_frames:
            frames = frames[chosen]
        return meta, frames, tuple(meta.frame_times_s[i] for i in chosen)

    def _load(self, row: int, view: View | None) -> Sample:
        num_frames, offsets = self.num_frames, None if view is None else view.offsets
        if self._keeps_samples and offsets is not None:
            num_frames, offsets = max(num_frames, self.manifest.num_frames), None
        meta, frames, times_s = self.decode(row, num_frames, offsets)
        return Sample(
            key=self.key(row),
            video_id=meta.video_id,
            captions=meta.captions,
            frames=fit_square(frames, self.image_size) if view is None else frames,
            frame_times_s=times_s,
        )

    def _shown(self, kept: Sample, view: View) -> Sample:
        frames, times_s = kept.frames, kept.frame_times_s
        if len(frames) > self.num_frames:
            chosen = segment_frames(len(frames), self.num_frames, view.offsets)
            frames, times_s = frames[chosen], tuple(times_s[i] for i in chosen)
        if view.crop is None:
            frames = fit_square(frames, self.image_size)
        else:
            frames = crop_frames(frames, crop_box(view.crop, *frames.shape[1:3]), self.image_size)
        return replace(kept, frames=frames, frame_times_s=times_s)

    def members(self, row: int) -> dict[str, bytes]:
        """Checked members of a sample by extension. Raises BadSample."""
        samples = self.manifest.samples
        shard, offset, length, crc32 = (
            int(column[row])
            for column in (samples.shard, samples.offset, samples.length, samples.crc32)
        )
        content = self._files.read(shard, offset, length, crc32, self.key(row))
        return parse_range(self.manifest, row, content)


def parse_range(manifest: Manifest, row: int, content: bytes) -> dict[str, bytes]:
    """Splits the byte range of a sample of a data set into its members, as `parse_members`."""
    samples = manifest.samples
    key, length, crc32 = str(samples.key[row]), int(samples.length[row]), int(samples.crc32[row])
    split = split_tar if manifest.beton is None else split_stack
    return parse_members(content, key, length, crc32, split)


def split_tar(content: bytes, key: str) -> dict[str, bytes]:
    """A sample's range of a shard -> its members by extension. Raises BadSample."""
    # webdataset annotates its file argument as a TarFile, which it is not. group_by_keys copies the
    # shard's URL into each group; there is none for a range in memory.
    files = (
        {**file, "__url__": ""}
        for file in tar_file_iterator(cast(tarfile.TarFile, io.BytesIO(content)))
    )
    groups = list(group_by_keys(files))
    if [group["__key__"] for group in groups] != [key]:
        raise BadSample(
            key, "missing_member", f"the range holds {[group['__key__'] for group in groups]}"
        )
    return {name: value for name, value in groups[0].items() if not name.startswith("__")}


def parse_members(
    content: bytes,
    key: str,
    length: int,
    crc32: int,
    split: Callable[[bytes, str], dict[str, bytes]] = split_tar,
) -> dict[str, bytes]:
    """Splits a sample's byte range into members by extension; refuses bytes that are not the packed
    ones."""
    if len(content) != length:
        raise BadSample(
            key, "checksum", f"{len(content)} of {length} bytes are there: the file is truncated"
        )
    if zlib.crc32(content) != crc32:
        raise BadSample(
            key, "checksum", f"crc32 {zlib.crc32(content):08x} is not the packed {crc32:08x}"
        )
    return split(content, key)


def parse_meta(key: str, members: dict[str, bytes]) -> SampleMeta:
    """Reads the JSON member and checks that the frames it promises are there. Raises BadSample."""
    if "json" not in members:
        raise BadSample(key, "missing_member", "json")
    try:
        fields = json.loads(members["json"])
        meta = SampleMeta(
            captions=_captions(fields["captions"], fields.get("words")),
            video_id=fields["video_id"],
            frame_times_s=tuple(fields["frame_times_s"]),
            jpegs=tuple(sorted(name for name in members if name.endswith(".jpg"))),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise BadSample(key, "unreadable", f"json: {error!r}") from error
    if not meta.captions:
        raise BadSample(key, "no_caption", "json holds no caption")
    if "mp4" not in members and (not meta.jpegs or len(meta.jpegs) != len(meta.frame_times_s)):
        found = f"{len(meta.jpegs)} of {len(meta.frame_times_s)} JPEG frames and no mp4"
        raise BadSample(key, "missing_member", found)
    return meta


def _captions(texts: list[str], words: list[list[list[int]]] | None) -> tuple[Caption, ...]:
    if words is None:
        return tuple(Caption(text=text) for text in texts)
    return tuple(
        Caption(text=text, words=tuple(Word(start, end, WordKind(kind)) for start, end, kind in of))
        for text, of in zip(texts, words, strict=True)
    )


def decode_members(
    key: str,
    members: dict[str, bytes],
    meta: SampleMeta,
    num_frames: int,
    *,
    offsets: Sequence[float] | None = None,
    sample: SampleFrames = sample_frames,
    place: np.ndarray | None = None,
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Frames (F, H, W, 3) uint8 as stored and their times, F <= num_frames; JPEGs that fit into
    `place` (num_frames, H, W, 3) lie there, with zeros behind them. Raises BadSample."""
    if "mp4" in members:
        return sample(members["mp4"], num_frames, offsets=offsets, key=key)
    chosen = segment_frames(len(meta.jpegs), num_frames, offsets)
    times_s = tuple(meta.frame_times_s[i] for i in chosen)
    pictures = [
        decode_jpeg(
            members[meta.jpegs[i]],
            key=key,
            member=meta.jpegs[i],
            place=None if place is None else place[at],
        )
        for at, i in enumerate(chosen)
    ]
    if len({picture.shape for picture in pictures}) > 1:
        raise BadSample(key, "unreadable", "its JPEG frames differ in size")
    if place is None or pictures[0].shape != place.shape[1:]:
        return np.stack(pictures), times_s
    place[len(pictures) :] = 0
    return place[: len(pictures)], times_s


def shared_between_processes(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised uint8; in a loader's worker it passes to the parent without a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    # As torch's default_collate; a tensor moved to shared memory afterwards would be copied there.
    storage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class _ShardFiles:
    """Byte ranges of shards. Local files stay open: on shared file systems opening costs more than
    reading."""

    def __init__(self, url: str, manifest: Manifest, folder: CacheFolder | None) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self.ahead: ShardsAhead | None = None
        self._store = Store(url)
        self._manifest = manifest
        self._cache: ShardCache | None = None
        if folder is not None and not self._store.is_local and manifest.beton is None:
            self._cache = ShardCache(folder, self._store, manifest.shards)
            # With less room the next shards would push out those being read.
            if folder.max_bytes >= 2 * self._cache.window_bytes:
                self.ahead = ShardsAhead(self._cache)

    def read(self, shard: int, offset: int, length: int, crc32: int, key: str) -> bytes:
        """The range, or what there is of it. Only a copy in the cache is checked against `crc32`,
        since the store may have better bytes."""
        name = self._manifest.file_of(shard).name
        try:
            if self._store.is_local:
                return self._read_local(name, offset, length)
            if self._cache is not None:
                content = self._cache.read(shard, offset, length)
                if content is not None and zlib.crc32(content) == crc32:
                    return content
                if content is not None:
                    self._cache.drop(shard)
            return self._store.read_range(name, offset, offset + length)
        except FileNotFoundError as error:
            raise BadSample(key, "missing_shard", self._store.path(name)) from error
        except OSError as error:
            raise BadSample(key, "read_error", str(error)) from error

    def _read_local(self, name: str, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._descriptor(name), length, offset)
        except OSError as error:
            if error.errno != errno.ESTALE or name not in self._descriptors:
                raise
            # A network file system forgot the open file, for example after its server restarted.
            os.close(self._descriptors.pop(name))
            return os.pread(self._descriptor(name), length, offset)

    def _descriptor(self, name: str) -> int:
        # Safe to share with forked workers: pread has no file position.
        if name not in self._descriptors:
            if len(self._descriptors) >= MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[name] = os.open(self._store.path(name), os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.move_to_end(name)
        return self._descriptors[name]

    def __del__(self) -> None:
        if self.ahead is not None:
            self.ahead.close()
        for descriptor in self._descriptors.values():
            os.close(descriptor)


class SampleCache:
    """Decoded samples, bounded by the bytes of their frames."""

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"cache_bytes={max_bytes} must be 0 (no cache) or more")
        self._max_bytes = max_bytes
        self._bytes = 0
        self._samples: OrderedDict[int, Sample] = OrderedDict()

    def get(self, row: int) -> Sample | None:
        if row in self._samples:
            self._samples.move_to_end(row)
        return self._samples.get(row)

    def put(self, row: int, sample: Sample) -> None:
        self._samples[row] = sample
        self._bytes += sample.frames.nbytes
        while self._bytes > self._max_bytes:
            self._bytes -= self._samples.popitem(last=False)[1].frames.nbytes
