"""The samples of several training sets as one data set: their reader, and their order.

Samples and shards are numbered one set after another, in the order of the sets' names. Keys and
video ids carry the name of their set, so that those of two sets never agree.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeAlias

import numpy as np

from tvr.data_prep.mixture import Mixture
from tvr.data_prep.reading.augment import View
from tvr.data_prep.reading.order import SampleLocation, SampleOrder
from tvr.data_prep.reading.sample_reader import NOT_PREDECODED, SampleReader, StoredFrames
from tvr.data_prep.records import BadSample, Sample, key_in_set


class MixedOrder:
    """The order of several data sets; interface and promises are those of `SampleOrder`.

    `mixture` states the contract.

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
        """Returns the sample at a stream position; `epoch` counts the epochs of its set."""
        number, own = self._mixture.locate(position)
        return self._numbered(number, self._orders[number].locate(own))

    def substitute(self, position: int, attempt: int) -> SampleLocation:
        """Returns the sample, of the same set, that replaces a bad sample at `position`."""
        number, own = self._mixture.locate(position)
        return self._numbered(number, self._orders[number].substitute(own, attempt))

    def next_window_shards(self, location: SampleLocation) -> tuple[int, ...]:
        """Returns the shards of the next window of the location's set."""
        number = bisect_right(self._first_shard, location.shard) - 1
        first = self._first_shard[number]
        own = replace(location, shard=location.shard - first)
        return tuple(first + shard for shard in self._orders[number].next_window_shards(own))

    def _numbered(self, number: int, own: SampleLocation) -> SampleLocation:
        return replace(
            own,
            shard=own.shard + self._first_shard[number],
            sample=own.sample + self._first_sample[number],
        )


class MixedReader:
    """Reads the samples of several data sets; its interface is that of `SampleReader`.

    Args:
        readers: Reader of each set by name, in the order of the names.
    """

    def __init__(self, readers: Mapping[str, SampleReader]) -> None:
        self._names = tuple(readers)
        self._readers = tuple(readers.values())
        self._first_row = _starts(len(reader) for reader in self._readers)
        self._first_shard = _starts(len(reader.manifest.shards) for reader in self._readers)
        self.num_frames = self._readers[0].num_frames
        self.image_size = self._readers[0].image_size

    def __len__(self) -> int:
        return sum(len(reader) for reader in self._readers)

    @property
    def prefetches(self) -> bool:
        """True if any of the sets prefetches, see `SampleReader`."""
        return any(reader.prefetches for reader in self._readers)

    @property
    def decodes_into_buffers(self) -> bool:
        """True if the frames of every set can be decoded directly into a batch."""
        return all(reader.decodes_into_buffers for reader in self._readers)

    def key(self, row: int) -> str:
        """Returns the key of a row, with the name of its set."""
        number = self._set_of(row)
        own = self._readers[number].key(row - self._first_row[number])
        return key_in_set(self._names[number], own)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Downloads shards in the background; does nothing for a set without a shard cache."""
        by_set: dict[int, list[int]] = {}
        for shard in shards:
            number = bisect_right(self._first_shard, shard) - 1
            by_set.setdefault(number, []).append(shard - self._first_shard[number])
        for number, own in by_set.items():
            self._readers[number].prefetch(own)

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

    def _set_of(self, row: int) -> int:
        return bisect_right(self._first_row, row) - 1


TrainingReader: TypeAlias = SampleReader | MixedReader
TrainingOrder: TypeAlias = SampleOrder | MixedOrder


def _starts(sizes: Iterable[int]) -> list[int]:
    """The number of the first of each set's items, where the sets follow one another."""
    return [0, *accumulate(sizes)][:-1]
