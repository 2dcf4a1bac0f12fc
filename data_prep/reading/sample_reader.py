"""Random access to the samples of a packed data set.

A read fetches a sample's byte range (`shard_bytes`), checks and parses it, decodes its frames, and
crops them. Decoded samples may be cached (`sample_cache`), and frames may be decoded directly into
a batch (`batch_buffers`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from tvr.data_prep.dataset.jpeg_stack import stack_names
from tvr.data_prep.dataset.manifest import Manifest, read_manifest
from tvr.data_prep.dataset.sample_codec import SampleMeta, decode_members, parse_meta, parse_range
from tvr.data_prep.reading.augment import View, crop_box, crop_frames
from tvr.data_prep.reading.locality import CacheNeed
from tvr.data_prep.reading.node_cache import CacheFolder
from tvr.data_prep.reading.sample_cache import DecodedSampleCache
from tvr.data_prep.reading.shard_bytes import ShardReader
from tvr.data_prep.records import BadSample, Sample, ShardCorrupt
from tvr.data_prep.storage.storage_errors import is_passing_error
from tvr.data_prep.video.decode import Finish
from tvr.data_prep.video.decoders import Decoder, frame_sampler
from tvr.data_prep.video.frame_sampling import FrameSpacing, check_spacing, segment_frames
from tvr.data_prep.video.images import fit_square

DecodedFrames = tuple[SampleMeta, np.ndarray, tuple[float, ...]]
"""Metadata, frames (F, H, W, 3) uint8, and the time of each frame in seconds."""


class StoredFrames(NamedTuple):
    """A sample that another component has read, checked and decoded."""

    json: bytes
    frames: np.ndarray
    """All stored frames, (F, H, W, 3) uint8."""


NOT_PREDECODED: Mapping[int, StoredFrames] = {}


class SampleReader:
    """Reads any sample of a data set by its manifest row.

    Each process uses its own reader; a reader created before a fork works in the child.

    Args:
        url: Folder or fsspec URL of the data set.
        num_frames: Frames per sample; a shorter clip gives fewer.
        image_size: Height and width of a frame in pixels.
        decoder: Video decoder, for the video layout.
        frame_spacing: Whether frames are taken evenly in time, for the video layout; see
            `decode.sample_frames`.
        cache_bytes: Bytes of decoded frames to cache in this process. The cache holds samples as
            `read` returns them or, if `read` gets views, as they are stored. It pays off if the
            data set fits: 400 clips of 6 JPEG frames of 48 x 48 are read at 14,000 samples/s
            instead of 600, in one process on a 2-core machine.
        shard_cache: Folder on a local disk for whole shards of a remote data set; ignored for a
            local data set.

    Raises:
        ValueError: the data set cannot provide these sizes, or the decoder is not available.
        FileNotFoundError, OSError, ShardCorrupt: see `read_manifest`.
    """

    def __init__(
        self,
        url: str,
        *,
        num_frames: int,
        image_size: int,
        decoder: Decoder = "pyav",
        frame_spacing: FrameSpacing = "time",
        cache_bytes: int = 0,
        shard_cache: CacheFolder | None = None,
    ) -> None:
        node_folder = None if shard_cache is None else shard_cache.path
        self.manifest = read_manifest(url, node_folder=node_folder)
        _check_sizes(url, self.manifest, num_frames, image_size)
        self.url = url
        self.num_frames = num_frames
        self.image_size = image_size
        self._reads: Counter[str] = Counter()
        self._shards = ShardReader(url, self.manifest, shard_cache, self._reads)
        check_spacing(frame_spacing, "frame_spacing")
        self._sample_frames = partial(frame_sampler(decoder), spacing=frame_spacing)
        if self.manifest.beton is not None:
            cache_bytes = 0  # FFCV decodes every batch anew
        self._cache = DecodedSampleCache(cache_bytes)
        self._has_cache = cache_bytes > 0

    def __len__(self) -> int:
        return self.manifest.num_samples

    def for_another_thread(self) -> SampleReader:
        """Returns a reader of the same data set and index, without a cache."""
        other = copy(self)
        other._reads, other._cache, other._has_cache = Counter(), DecodedSampleCache(0), False
        other._shards = ShardReader(self.url, self.manifest, None, other._reads)
        return other

    def key(self, row: int) -> str:
        """Returns the key of a manifest row."""
        return str(self.manifest.samples.key[row])

    @property
    def caches_shards(self) -> bool:
        """True if whole shards are cached on this node."""
        return self._shards.has_cache

    @property
    def decodes_into_buffers(self) -> bool:
        """True if `read` can decode frames directly into a batch."""
        return self.manifest.layout == "frames" and not self._has_cache

    def reserve_cache(self, need: CacheNeed) -> bool:
        """Checks the size of the shard cache, and downloads shards ahead if it has room for them.

        Returns:
            True if shards are downloaded ahead.

        Raises:
            ValueError: see `CacheFolder.check`.
        """
        return self._shards.reserve(need)

    def use_shards(self, current: Sequence[int], upcoming: Sequence[int]) -> None:
        """Tells which shards this node downloads whole; before the first call, every one read.

        Args:
            current: Shards that are read now, and stay in the cache until the next call.
            upcoming: Shards that are read next; they are downloaded in the background.
        """
        self._shards.use(current, upcoming)

    def pop_read_counts(self) -> dict[str, int]:
        """Returns the number of samples read since the last call, by READ_SOURCES."""
        counts = dict(self._reads)
        self._reads.clear()
        return counts

    def read(
        self,
        row: int,
        view: View | None = None,
        *,
        out: np.ndarray | None = None,
        predecoded: Mapping[int, StoredFrames] = NOT_PREDECODED,
    ) -> Sample:
        """Reads one sample with frames (num_frames or fewer, image_size, image_size, 3).

        Call a reader either always or never with a view: the cache holds one kind of sample.

        Args:
            row: Manifest row.
            view: Random choices; None = middle frames and centre squares.
            out: (num_frames, image_size, image_size, 3) uint8. If the stored JPEG frames have this
                size, they are decoded into it and the sample's frames are a view of it.
            predecoded: Samples by manifest row that need not be read again.

        Raises:
            BadSample: the sample cannot be used.
        """
        cached = self._cache.get(row)
        if cached is not None:
            self._reads["memory"] += 1
        else:
            is_stored = row in predecoded or (self._has_cache and view is not None)
            finish = None if is_stored else self._finish(view)
            cached = self._load(row, view, out, predecoded, finish)
            self._cache.put(row, cached)
            if not is_stored:
                return cached
        return cached if view is None else self._apply_view(cached, view)

    def decode(
        self,
        row: int,
        num_frames: int,
        offsets: Sequence[float] | None,
        *,
        out: np.ndarray | None = None,
        predecoded: Mapping[int, StoredFrames] = NOT_PREDECODED,
        finish: Finish | None = None,
    ) -> DecodedFrames:
        """Reads the frames that `segment_frames` selects, in their stored size; see `read`.

        Args:
            finish: Applied to each picture as it comes, so that only its results are held; not to
                frames in `predecoded`.

        Raises:
            BadSample: the sample cannot be used.
        """
        key = self._checked_key(row)
        if row in predecoded:
            self._reads["beton"] += 1
            return _select_frames(key, predecoded[row], num_frames, offsets)
        members = self.members(row)
        meta = parse_meta(key, members)
        return meta, *decode_members(
            key,
            members,
            meta,
            num_frames,
            offsets=offsets,
            sample=self._sample_frames,
            out=out,
            finish=finish,
        )

    def members(self, row: int) -> dict[str, bytes]:
        """Reads a sample's members by file extension, and checks their bytes.

        Raises:
            BadSample: the bytes are missing or differ from what was packed.
        """
        key, samples = self._checked_key(row), self.manifest.samples
        shard, offset, length, crc32 = (
            int(column[row])
            for column in (samples.shard, samples.offset, samples.length, samples.crc32)
        )
        content = self._shards.read(shard, offset, length, crc32, key)
        return parse_range(self.manifest, row, content)

    def _checked_key(self, row: int) -> str:
        """Returns a row's key. The index is checked block by block, when a block is first read.

        Raises:
            BadSample: the block is damaged, or the storage fails.
        """
        try:
            return self.key(row)
        except ShardCorrupt as error:
            raise BadSample(f"row {row}", "checksum", str(error)) from error
        except OSError as error:
            reason = "unavailable" if is_passing_error(error) else "read_error"
            raise BadSample(f"row {row}", reason, str(error)) from error

    def _load(
        self,
        row: int,
        view: View | None,
        out: np.ndarray | None,
        predecoded: Mapping[int, StoredFrames],
        finish: Finish | None,
    ) -> Sample:
        """Reads a sample in the form that the cache holds, or as `finish` makes its frames."""
        num_frames, offsets = self.num_frames, None if view is None else view.offsets
        if self._has_cache and offsets is not None:
            # Another view of this sample may need other frames: load all of them.
            num_frames, offsets = max(num_frames, self.manifest.num_frames), None
        meta, frames, times_s = self.decode(
            row, num_frames, offsets, out=out, predecoded=predecoded, finish=finish
        )
        return Sample(
            key=self.key(row),
            video_id=meta.video_id,
            captions=meta.captions,
            frames=fit_square(frames, self.image_size) if view is finish is None else frames,
            frame_times_s=times_s,
        )

    def _finish(self, view: View | None) -> Finish:
        """Returns what makes the shown frame of a stored one, as `_apply_view` does of a clip."""
        size, crop = self.image_size, None if view is None else view.crop

        def finish(picture: np.ndarray) -> np.ndarray:
            if crop is None:
                return fit_square(picture[None], size)[0]
            return crop_frames(picture[None], crop_box(crop, *picture.shape[:2]), size)[0]

        return finish

    def _apply_view(self, sample: Sample, view: View) -> Sample:
        frames, times_s = sample.frames, sample.frame_times_s
        if len(frames) > self.num_frames:
            chosen = segment_frames(len(frames), self.num_frames, view.offsets)
            frames, times_s = frames[chosen], tuple(times_s[i] for i in chosen)
        if view.crop is None:
            frames = fit_square(frames, self.image_size)
        else:
            frames = crop_frames(frames, crop_box(view.crop, *frames.shape[1:3]), self.image_size)
        return replace(sample, frames=frames, frame_times_s=times_s)


def _check_sizes(url: str, manifest: Manifest, num_frames: int, image_size: int) -> None:
    if num_frames < 1 or image_size < 1:
        raise ValueError(f"num_frames={num_frames} and image_size={image_size} must be at least 1")
    stored = manifest.num_frames
    if manifest.layout == "frames" and num_frames > stored:
        raise ValueError(
            f"num_frames={num_frames} must be from 1 to {stored}, the frames stored per sample"
            f" in {url}; give no more (data.num_frames, or --num-frames), or pack again with more"
        )


def _select_frames(
    key: str, stored: StoredFrames, num_frames: int, offsets: Sequence[float] | None
) -> DecodedFrames:
    frames = stored.frames
    names = dict.fromkeys(stack_names(len(frames)), b"")
    meta = parse_meta(key, {"json": stored.json, **names})
    chosen = segment_frames(len(frames), num_frames, offsets)
    if len(frames) > num_frames:
        frames = frames[chosen]
    return meta, frames, tuple(meta.frame_times_s[i] for i in chosen)
