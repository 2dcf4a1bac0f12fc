"""Random access to packed samples: a byte range of a shard, checked, then parsed by webdataset."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from tvr.data_prep.dataset.jpeg_stack import stack_names
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.dataset.sample_codec import SampleMeta, decode_members, parse_meta, parse_range
from tvr.data_prep.reading.augment import View, crop_box, crop_frames
from tvr.data_prep.reading.batch_buffers import BatchSlot, BatchSlots, private_slot
from tvr.data_prep.reading.node_cache import CacheFolder
from tvr.data_prep.reading.shard_bytes import ShardReader
from tvr.data_prep.records import Sample
from tvr.data_prep.video.decoders import Decoder, frame_sampler
from tvr.data_prep.video.frame_sampling import segment_frames
from tvr.data_prep.video.images import fit_square

# In evaluation, where the next shard is read when this one is done.
PREFETCHED_SHARDS = 2


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
        self._files = ShardReader(url, self.manifest, shard_cache)
        self._sample_frames = frame_sampler(decoder)
        if self.manifest.beton is not None:
            cache_bytes = 0  # FFCV decodes every batch anew
        self._cache = DecodedSampleCache(cache_bytes)
        self._keeps_samples = cache_bytes > 0
        self._held: dict[int, tuple[bytes, np.ndarray]] = {}
        self.room: BatchSlot | None = None
        """Where the frames of the batch being read may lie."""
        self.rooms: BatchSlots | None = None
        """Of a loader whose workers read by this reader."""
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
        return tuple(range(here + 1, min(here + PREFETCHED_SHARDS, last) + 1))

    def take_reads(self) -> dict[str, int]:
        """How many samples were read since the last call, by READ_SOURCES."""
        reads = dict(self._files.reads)
        self._files.reads.clear()
        return reads

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetches shards in the background; they are needed soon."""
        if self._files.ahead is not None:
            self._files.ahead.want(shards)

    @property
    def decodes_into_place(self) -> bool:
        """Whether frames are decoded to where their batch lies, if they are stored in its size."""
        return self.manifest.layout == "frames" and not self._keeps_samples

    def make_room(self, count: int) -> None:
        """Makes room for a batch of the next `count` samples."""
        if self.decodes_into_place:
            shape = (count, self.num_frames, self.image_size, self.image_size, 3)
            self.room = private_slot(shape) if self.rooms is None else self.rooms.take(count)
            self._places = iter(self.room.frames.numpy())

    def hold(self, decoded: dict[int, tuple[bytes, np.ndarray]], room: BatchSlot | None) -> None:
        """Takes samples that somebody else read, checked and decoded: the JSON and all stored
        frames by row, instead of those held before; `room` is where they lie."""
        self._held, self.room, self._places = decoded, room, iter(())

    def read(self, row: int, view: View | None = None) -> Sample:
        """Frames at (num_frames or fewer, image_size, image_size, 3): those a view shows, or the
        middle ones' squares at the centre. Raises BadSample.

        One reader is asked for views always or never: what it keeps is of one kind.
        """
        kept = self._cache.get(row)
        if kept is not None:
            self._files.reads["memory"] += 1
        else:
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
            self._files.reads["beton"] += 1
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


class DecodedSampleCache:
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
