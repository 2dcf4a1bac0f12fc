"""The samples of several training sets as one data set: their reader, and their order.

Samples and shards are numbered one set after another, in the order of the sets' names. Keys and
video ids carry the name of their set, so that those of two sets never agree.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from tvr.data_prep.dataset.manifest import Manifest
from tvr.data_prep.mixture import Mixture
from tvr.data_prep.reading.augment import View
from tvr.data_prep.reading.locality import NOTHING_NEEDED, CacheNeed, RankShare, training_need
from tvr.data_prep.reading.node_cache import CacheFolder
from tvr.data_prep.reading.order import (
    OrderWindow,
    Regroup,
    SampleLocation,
    SampleLocations,
    SampleOrder,
    window_shards,
)
from tvr.data_prep.reading.sample_reader import NOT_PREDECODED, SampleReader, StoredFrames
from tvr.data_prep.records import BadSample, Sample, TrainingSet, key_in_set
from tvr.data_prep.stored.tower_outputs import StoredReader, TowerOutputs

NO_REGROUP: Mapping[str, Regroup] = {}


class MixedOrder:
    """The order of several data sets; interface and promises are those of `SampleOrder`.

    `mixture` states the contract. The windows, epochs and places of a sample are those of its set.

    Args:
        mixture: The sets that positions belong to.
        orders: Order of each set under its own seed, in the order of `mixture.names`.
    """

    def __init__(self, mixture: Mixture, orders: Sequence[SampleOrder]) -> None:
        self.seed = mixture.seed
        self._mixture = mixture
        self._orders = tuple(orders)
        self._first_sample = _starts(order.num_samples for order in orders)
        self._first_shard = _starts(order.num_shards for order in orders)

    def locate(self, position: int) -> SampleLocation:
        """Returns the sample at a stream position."""
        number, own = self._mixture.locate(position)
        return self._numbered(number, self._orders[number].locate(own))

    def locate_range(self, start: int, stop: int) -> SampleLocations:
        """Returns the samples at the stream positions from `start` to below `stop`."""
        sets, own = self._mixture.locate_range(start, stop)
        length = stop - start
        found = SampleLocations(
            **{name: np.empty(length, np.int64) for name in ("epoch", "shard", "index", "sample")},
            place=np.empty(length, np.float64),
        )
        for number, order in enumerate(self._orders):
            here = np.flatnonzero(sets == number)
            if len(here):
                # The positions of a set have no gaps in its own stream.
                part = order.locate_range(int(own[here[0]]), int(own[here[-1]]) + 1)
                found.epoch[here] = part.epoch
                found.shard[here] = part.shard + self._first_shard[number]
                found.index[here] = part.index
                found.sample[here] = part.sample + self._first_sample[number]
                found.place[here] = part.place
        return found

    def substitute(self, position: int, attempt: int) -> SampleLocation:
        """Returns the sample, of the same set, that replaces a bad sample at `position`."""
        number, own = self._mixture.locate(position)
        return self._numbered(number, self._orders[number].substitute(own, attempt))

    def windows_in_use(self, start: int, stop: int) -> tuple[list[OrderWindow], list[OrderWindow]]:
        """Returns the windows of a range's positions, of all sets, and those that are read next."""
        before, after = self._mixture.drawn(start), self._mixture.drawn(stop)
        current, upcoming = list[OrderWindow](), list[OrderWindow]()
        for name, order, first in zip(
            self._mixture.names, self._orders, self._first_shard, strict=True
        ):
            # A set without a position here has its next one soon.
            own = order.windows_in_use(before[name], max(after[name], before[name] + 1))
            for found, windows in zip((current, upcoming), own, strict=True):
                found += [replace(window, shards=window.shards + first) for window in windows]
        return current, upcoming

    def _numbered(self, number: int, own: SampleLocation) -> SampleLocation:
        return replace(
            own,
            shard=own.shard + self._first_shard[number],
            sample=own.sample + self._first_sample[number],
        )


SetReader: TypeAlias = SampleReader | StoredReader


class MixedReader:
    """Reads the samples of several data sets; its interface is that of `SampleReader`.

    Args:
        readers: Reader of each set by name, in the order of the names.
    """

    def __init__(self, readers: Mapping[str, SetReader]) -> None:
        self._names = tuple(readers)
        self._readers = tuple(readers.values())
        self._first_row = _starts(len(reader) for reader in self._readers)
        self._first_shard = _starts(len(reader.manifest.shards) for reader in self._readers)
        self.num_frames = self._readers[0].num_frames
        self.image_size = self._readers[0].image_size

    def __len__(self) -> int:
        return sum(len(reader) for reader in self._readers)

    @property
    def caches_shards(self) -> bool:
        """True if whole shards of any of the sets are cached on this node."""
        return any(reader.caches_shards for reader in self._readers)

    @property
    def decodes_into_buffers(self) -> bool:
        """True if the frames of every set can be decoded directly into a batch."""
        return all(reader.decodes_into_buffers for reader in self._readers)

    def key(self, row: int) -> str:
        """Returns the key of a row, with the name of its set."""
        number = self._set_of(row)
        own = self._readers[number].key(row - self._first_row[number])
        return key_in_set(self._names[number], own)

    def use_shards(self, current: Sequence[int], upcoming: Sequence[int]) -> None:
        """Tells which shards this node downloads whole, see `SampleReader.use_shards`."""
        now, soon = self._by_set(current), self._by_set(upcoming)
        for reader, own, own_soon in zip(self._readers, now, soon, strict=True):
            reader.use_shards(own, own_soon)

    def pop_read_counts(self) -> dict[str, int]:
        """Returns the number of samples read since the last call, by READ_SOURCES."""
        counts = Counter[str]()
        for reader in self._readers:
            counts.update(reader.pop_read_counts())
        return dict(counts)

    def read(
        self,
        row: int,
        view: View | None = None,
        *,
        out: np.ndarray | None = None,
        predecoded: Mapping[int, StoredFrames] = NOT_PREDECODED,
    ) -> Sample:
        """Reads one sample, see `SampleReader.read`; a beton's `predecoded` samples do not occur.

        Raises:
            BadSample: the sample cannot be used; its key carries the name of its set.
        """
        number = self._set_of(row)
        name = self._names[number]
        try:
            sample = self._readers[number].read(row - self._first_row[number], view, out=out)
        except BadSample as error:
            key = key_in_set(name, error.key)
            raise BadSample(key, error.reason, error.detail) from error
        return replace(
            sample,
            key=key_in_set(name, sample.key),
            video_id=key_in_set(name, sample.video_id),
        )

    def _by_set(self, shards: Sequence[int]) -> list[list[int]]:
        """The shards of each set, in its own numbers."""
        own: list[list[int]] = [[] for _ in self._readers]
        for shard in shards:
            number = bisect_right(self._first_shard, shard) - 1
            own[number].append(shard - self._first_shard[number])
        return own

    def _set_of(self, row: int) -> int:
        return bisect_right(self._first_row, row) - 1


TrainingReader: TypeAlias = SetReader | MixedReader
TrainingOrder: TypeAlias = SampleOrder | MixedOrder


class OpenedSets(NamedTuple):
    """The training sets of a run, opened."""

    reader: TrainingReader
    order: TrainingOrder
    readers: Sequence[SetReader]
    """Reader of each set."""
    orders: Sequence[SampleOrder]
    """Order of each set."""
    shares: Sequence[float]
    """Part of the stream that each set has."""

    def cache_need(self, share: RankShare, workers: int) -> CacheNeed:
        """Returns the room that the remote sets need in the node's shard cache, see `locality`."""
        needs = [
            training_need(reader.manifest.shards, order, share, workers, part=part)
            for reader, order, part in zip(self.readers, self.orders, self.shares, strict=True)
            if reader.caches_shards
        ]
        return sum(needs, NOTHING_NEEDED)


def open_sets(
    sets: Sequence[TrainingSet],
    *,
    seed: int,
    global_batch: int,
    cache_bytes: int,
    outputs: Mapping[str, TowerOutputs] | None = None,
    regroup: Mapping[str, Regroup] = NO_REGROUP,
    **reading: Any,
) -> OpenedSets:
    """Opens one training set without a name, or several with names.

    Args:
        sets: The sets.
        seed: Seed of the run.
        global_batch: Pairs per step on all ranks together.
        cache_bytes: Bytes of decoded frames to cache per worker; sets share them by their weights.
        outputs: Stored tower outputs of each set by its name, in place of its frames.
        regroup: Last step of the order of each set, by its name; see `SampleOrder`.
        reading: Other arguments of `SampleReader`.

    Raises:
        FileNotFoundError, OSError, ShardCorrupt: see `read_manifest`.
        ValueError: as `SampleReader` and `Mixture`; or a set of several is a beton.
    """
    assert len({each.name for each in sets}) == len(sets), "two training sets have the same name"
    if not sets[0].name:
        (alone,) = sets
        reader = set_reader(alone, outputs, cache_bytes, reading)
        order = set_order(reader.manifest, seed, global_batch, regroup=regroup.get(""))
        return OpenedSets(reader, order, [reader], [order], [1.0])
    mixture = Mixture({each.name: each.weight for each in sets}, seed)
    named, readers, orders = {each.name: each for each in sets}, {}, []
    for number, (name, share) in enumerate(zip(mixture.names, mixture.shares, strict=True)):
        reader = set_reader(named[name], outputs, int(cache_bytes * share), reading)
        if reader.manifest.beton is not None:
            raise ValueError(
                f"training set {name} (data.train_sets): {named[name].url} is a beton, which cannot"
                " be mixed with other sets; give the shards that it was written from"
            )
        readers[name] = reader
        own_seed, own = mixture.set_seed(number), regroup.get(name)
        orders.append(set_order(reader.manifest, own_seed, global_batch, share, regroup=own))
    return OpenedSets(
        MixedReader(readers),
        MixedOrder(mixture, orders),
        list(readers.values()),
        orders,
        mixture.shares,
    )


def set_reader(
    each: TrainingSet,
    outputs: Mapping[str, TowerOutputs] | None,
    cache_bytes: int,
    reading: Mapping[str, Any],
) -> SetReader:
    """Opens one set: its stored tower outputs if there are any, else its samples."""
    if outputs is not None:
        cache: CacheFolder | None = reading["shard_cache"]
        return StoredReader(each.url, outputs[each.name], None if cache is None else cache.path)
    return SampleReader(each.url, cache_bytes=cache_bytes, **reading)


def set_order(
    manifest: Manifest,
    seed: int,
    global_batch: int,
    share: float = 1.0,
    *,
    regroup: Regroup | None = None,
) -> SampleOrder:
    """Returns the order of a set that has a share of each global batch.

    Args:
        manifest: Index of the set.
        seed: The set's own seed.
        global_batch: Pairs per step on all ranks together.
        share: Part of the stream that the set has.
        regroup: Last step of the order, see `SampleOrder`.
    """
    sizes = manifest.shard_sizes
    per_window = window_shards(math.ceil(global_batch * share), len(sizes))
    return SampleOrder(sizes, seed, per_window, regroup)


def _starts(sizes: Iterable[int]) -> list[int]:
    """The number of the first of each set's items, where the sets follow one another."""
    return [0, *accumulate(sizes)][:-1]
