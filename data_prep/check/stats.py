"""Statistics of a data set: totals from its manifest, and distributions from its samples."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from tvr.data_prep.check.captions import (
    CaptionAccumulator,
    CaptionStatistics,
    FrequentCaption,
    expected_equal_pairs,
)
from tvr.data_prep.check.distribution import Distribution, distribution
from tvr.data_prep.check.sequential_reads import (
    CHUNK_BYTES,
    JOBS,
    OnBytes,
    ReadMeter,
    SequentialShard,
    map_shards,
    read_members,
)
from tvr.data_prep.dataset.manifest import Layout, Manifest
from tvr.data_prep.dataset.sample_codec import parse_meta, stored_index
from tvr.data_prep.dataset.sample_table import hash_texts
from tvr.data_prep.records import ADJUSTMENTS, BadSample, hash_caption
from tvr.data_prep.storage.storage import Storage
from tvr.data_prep.storage.storage_errors import is_passing_error
from tvr.data_prep.video.decode import describe_video, first_frame
from tvr.data_prep.video.frame_index import FrameIndex
from tvr.data_prep.video.frame_sampling import segment_centres

MOST_FREQUENT = 10
BATCH = 1024
"""Pairs of the global batch for which pairs of equal captions are predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFacts:
    """Properties of one sample and of its source video."""

    row: int
    """Manifest row."""
    video_id: str
    captions: tuple[str, ...]
    duration_s: float
    frame_rate_hz: float
    width: int
    """Pixels of the source, before any rotation."""
    height: int
    adjusted: tuple[str, ...]
    """What the pictures needed to be shown, names in ADJUSTMENTS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedCaption:
    """A caption that several videos have."""

    text: str
    """As the sample writes it; empty if the sample cannot be read again."""
    num_videos: int
    key: str
    """Key of the first sample that has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetStatistics:
    """Statistics of a data set.

    Totals and sizes describe the whole data set; captions, durations, frame rates and source sizes
    describe the samples that were read.
    """

    layout: Layout
    num_frames: int
    """Stored per sample; 0 in the video layout."""
    num_samples: int
    num_videos: int
    """Distinct video ids."""
    num_captions: int
    num_bytes: int
    refused: dict[str, int]
    """Clips refused when packing, by reason."""
    num_empty_captions: int
    """Empty captions dropped when packing."""
    captions_per_video: Distribution | None
    sample_bytes: Distribution | None
    samples_per_shard: Distribution | None
    num_read: int
    unread: dict[str, int]
    """Samples that could not be read, by reason."""
    captions: CaptionStatistics
    most_shared: tuple[SharedCaption, ...]
    """The captions of most videos."""
    equal_pairs_in_batch: float
    """Expected number of pairs of different videos with equal captions in a global batch of BATCH
    pairs. Neither is a negative of the other if `loss.mask_equal_captions` is on."""
    duration_s: Distribution | None
    frame_rate_hz: Distribution | None
    short_side: Distribution | None
    """Pixels of the source."""
    aspect: Distribution | None
    """Width / height of the source, as stored."""
    adjusted: dict[str, int]
    """Samples whose pictures are shown otherwise than stored, by ADJUSTMENTS."""


@dataclass(slots=True)
class FactsAccumulator:
    """Facts of many samples, in 36 bytes per sample and 20 bytes per caption."""

    row: array[int] = field(default_factory=lambda: array("Q"))
    captions: CaptionAccumulator = field(default_factory=CaptionAccumulator)
    duration_s: array[float] = field(default_factory=lambda: array("d"))
    frame_rate_hz: array[float] = field(default_factory=lambda: array("d"))
    width: array[int] = field(default_factory=lambda: array("I"))
    height: array[int] = field(default_factory=lambda: array("I"))
    adjusted: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)

    def add(self, facts: SampleFacts) -> None:
        """Adds one sample."""
        self.row.append(facts.row)
        self.captions.add(facts.video_id, facts.captions)
        self.duration_s.append(facts.duration_s)
        self.frame_rate_hz.append(facts.frame_rate_hz)
        self.width.append(facts.width)
        self.height.append(facts.height)
        self.adjusted.update(facts.adjusted)

    def merge(self, other: FactsAccumulator) -> None:
        """Adds the samples of another accumulator."""
        self.row.extend(other.row)
        self.captions.merge(other.captions)
        self.duration_s.extend(other.duration_s)
        self.frame_rate_hz.extend(other.frame_rate_hz)
        self.width.extend(other.width)
        self.height.extend(other.height)
        self.adjusted.update(other.adjusted)
        self.unread.update(other.unread)


def read_facts(
    url: str,
    manifest: Manifest,
    *,
    samples: int | None = None,
    jobs: int = JOBS,
    on_bytes: OnBytes | None = None,
) -> FactsAccumulator:
    """Reads the facts of a data set's samples.

    Args:
        url: Folder or fsspec URL of the data set.
        manifest: Index of the data set.
        samples: Samples to read, evenly spaced; None = all.
        jobs: Shards to read in parallel.
        on_bytes: Called after each read.

    Raises:
        ValueError: `samples` or `jobs` is out of range.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples={samples} must be 1 or more")
    total = manifest.num_samples
    rows = np.array(segment_centres(total, total if samples is None else samples))
    if len(rows) == total:
        num_bytes, read_ahead = sum(shard.shard_bytes for shard in manifest.files), CHUNK_BYTES
    else:  # single samples: reading ahead would read samples that are not selected
        num_bytes, read_ahead = int(manifest.samples.length[rows].sum()), 0
    meter = ReadMeter(num_bytes, on_bytes)
    read = partial(_read_shard, Storage(manifest.files_url(url)), manifest, rows, meter, read_ahead)
    merged = FactsAccumulator()
    for facts in map_shards(jobs, read, range(len(manifest.files)), meter):
        merged.merge(facts)
    return merged


def shared_captions(
    url: str, manifest: Manifest, facts: FactsAccumulator, count: int = MOST_FREQUENT
) -> list[SharedCaption]:
    """Finds the captions that most videos have, and reads a sample of each for its text."""
    store = Storage(manifest.files_url(url))
    return [
        _shared_caption(store, manifest, facts.row[frequent.sample], frequent)
        for frequent in facts.captions.most_frequent(count)
    ]


def dataset_statistics(
    manifest: Manifest, facts: FactsAccumulator, shared: Sequence[SharedCaption] = ()
) -> DatasetStatistics:
    """Computes the statistics of a data set.

    Args:
        manifest: Index of the data set.
        facts: Facts of its samples.
        shared: From `shared_captions`.
    """
    samples = manifest.samples
    video_ids, videos = np.unique(hash_texts(samples.video_id), return_inverse=True)
    width, height = (np.array(side, dtype=np.float64) for side in (facts.width, facts.height))
    captions = facts.captions.statistics()
    return DatasetStatistics(
        layout=manifest.layout,
        num_frames=manifest.num_frames,
        num_samples=manifest.num_samples,
        num_videos=len(video_ids),
        num_captions=manifest.num_captions,
        num_bytes=sum(shard.shard_bytes for shard in manifest.files),
        refused=manifest.bad,
        num_empty_captions=manifest.num_empty_captions,
        captions_per_video=distribution(
            np.bincount(videos, np.asarray(samples.num_captions)), whole=True
        ),
        sample_bytes=distribution(np.asarray(samples.length)),
        samples_per_shard=distribution(np.array(manifest.shard_sizes), whole=True),
        num_read=len(width),
        unread=dict(sorted(facts.unread.items())),
        captions=captions,
        most_shared=tuple(shared),
        equal_pairs_in_batch=expected_equal_pairs(
            captions.equal_probability, manifest.num_samples, BATCH
        ),
        duration_s=distribution(np.array(facts.duration_s)),
        frame_rate_hz=distribution(np.array(facts.frame_rate_hz)),
        short_side=distribution(np.minimum(width, height), whole=True),
        aspect=distribution(width / height),
        adjusted=dict(sorted(facts.adjusted.items())),
    )


def _read_shard(
    store: Storage,
    manifest: Manifest,
    rows: np.ndarray,
    meter: ReadMeter,
    read_ahead: int,
    number: int,
) -> FactsAccumulator:
    facts = FactsAccumulator()
    file = SequentialShard(store, manifest.files[number], meter, read_ahead=read_ahead)
    within = manifest.rows_of_file(number)
    wanted = rows[slice(*np.searchsorted(rows, (within.start, within.stop)))].tolist()
    for done, row in enumerate(wanted):
        try:
            key = str(manifest.samples.key[row])
            facts.add(_parse_facts(row, key, read_members(file, manifest, row)))
        except BadSample as error:
            facts.unread[error.reason] += 1
        except OSError as error:
            # The store has already retried; every other sample of the shard would fail as well.
            reason = "unavailable" if is_passing_error(error) else "read_error"
            if isinstance(error, FileNotFoundError):
                reason = "missing_shard"
            facts.unread[reason] += len(wanted) - done
            break
    return facts


def _shared_caption(
    store: Storage, manifest: Manifest, row: int, frequent: FrequentCaption
) -> SharedCaption:
    key, text = str(manifest.samples.key[row]), ""
    shard = manifest.file_of_shard(int(manifest.samples.shard[row]))
    try:
        file = SequentialShard(store, shard, ReadMeter(0, None), read_ahead=0)
        texts = parse_meta(key, read_members(file, manifest, row)).texts
        text = next((each for each in texts if hash_caption(each) == frequent.caption_hash), "")
    except (BadSample, OSError):
        pass  # It was readable a moment ago. Its key and its number of videos are still known.
    return SharedCaption(text=text, num_videos=frequent.num_videos, key=key)


def _parse_facts(row: int, key: str, members: dict[str, bytes]) -> SampleFacts:
    meta = parse_meta(key, members)
    try:
        fields = json.loads(members["json"])
        if "source_size" not in fields:
            fields |= _describe(key, members)
        if fields.get("span_s") is None:
            # The times of its frames; the container's own numbers may be wrong.
            fields |= _timed(stored_index(key, members))
        width, height = fields["source_size"]
        facts = SampleFacts(
            row=row,
            video_id=meta.video_id,
            captions=meta.texts,
            duration_s=float(fields["duration_s"]),
            frame_rate_hz=float(fields["fps"]),
            width=int(width),
            height=int(height),
            adjusted=tuple(name for name in ADJUSTMENTS if name in fields.get("adjusted", ())),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise BadSample(key, "unreadable", f"json: {error!r}") from error
    sizes = (facts.width, facts.height, facts.duration_s, facts.frame_rate_hz)
    if min(sizes[:2]) < 1 or not all(map(math.isfinite, sizes)):
        raise BadSample(key, "unreadable", f"json: width, height, duration_s, fps = {sizes}")
    return facts


def _timed(index: FrameIndex | None) -> dict[str, float]:
    """Duration and mean rate of a whole video by its frames' times; empty if they are unknown.

    The last frame is shown as long as the shorter of the two before it, see `timed_frames`.
    """
    if index is None or index.pts is None or index.num_frames < 2:
        return {}
    last = min(after - before for before, after in pairwise(index.pts[-3:]))
    duration_s = (index.ticks(index.num_frames - 1) + last) * index.unit_s
    rate = round(float(index.num_frames / duration_s), 6)
    return {"duration_s": round(float(duration_s), 6), "fps": rate}


def _describe(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    """Returns what packing would have noted of a video in another tool's shard."""
    if "mp4" not in members:
        return {}
    info = describe_video(members["mp4"], key=key)
    return {
        "source_size": (info.width, info.height),
        "fps": info.frame_rate_hz,
        "duration_s": info.duration_s,
        "adjusted": first_frame(members["mp4"], key)[1].adjusted,
    }
