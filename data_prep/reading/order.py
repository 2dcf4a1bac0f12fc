"""The sample order: a pure function of (seed, epoch, shard sizes, stream position).

THE CONTRACT. For a data set of N samples, stream position p belongs to epoch p // N. An epoch is a
permutation of all samples: the shards are shuffled, then the samples within each window of
`window_shards` shards, so that a reader uses few shards at a time. All random numbers are raw
64-bit words of numpy's Philox generator, keyed by (seed, epoch) and sorted stably; numpy's own
shuffles are avoided, because their results may change between releases. World size, loader workers
and restarts do not affect the order.

Changing any number of this module changes the data of every resumed run. Such a change needs the
label "order break" in the change log and new golden positions in the tests.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW_SHARDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLocation:
    """The sample that is read at a stream position."""

    epoch: int
    shard: int
    index: int
    """Row within the shard."""
    sample: int
    """Row within the data set (manifest row)."""


class SampleOrder:
    """The order of one data set under one seed.

    Caches the permutations of at most two epochs.

    Raises:
        ValueError: an argument is out of range, or there are no samples.
    """

    def __init__(
        self, shard_sizes: Sequence[int], seed: int, window_shards: int = WINDOW_SHARDS
    ) -> None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed} must be from 0 to 2**63 - 1")
        if window_shards < 1:
            raise ValueError(f"window_shards={window_shards} must be at least 1")
        if any(size < 0 for size in shard_sizes) or sum(shard_sizes) == 0:
            raise ValueError(
                f"shard sizes {list(shard_sizes)[:8]}... hold no samples; expected at least one"
            )
        self.seed = seed
        self.num_samples = sum(shard_sizes)
        self.num_shards = len(shard_sizes)
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._window_shards = window_shards
        self._permutations: dict[int, np.ndarray] = {}
        self._shard_orders: dict[int, np.ndarray] = {}

    def locate(self, position: int) -> SampleLocation:
        """Returns the sample at a stream position; positions start at 0 and have no end."""
        epoch, step = divmod(position, self.num_samples)
        return self._location(epoch, int(self._permutation(epoch)[step]))

    def substitute(self, position: int, attempt: int) -> SampleLocation:
        """Returns the sample that replaces a bad sample at `position`.

        The choice is uniform over the data set, by blake2b of (seed, position, attempt), so every
        rank and every restart makes the same choice. The substitute may already be in the batch.

        Args:
            position: Stream position of the bad sample.
            attempt: 1 for the first substitute, 2 if that is bad as well, and so on.
        """
        if attempt < 1:
            raise ValueError(f"attempt={attempt} must be at least 1")
        return self._location(
            position // self.num_samples,
            _hash("substitute", self.seed, position, attempt) % self.num_samples,
        )

    def next_window_shards(self, location: SampleLocation) -> tuple[int, ...]:
        """Returns the shards of the next window; the last window is followed by the next epoch."""
        shards = self._shard_order(location.epoch)
        window = int(np.flatnonzero(shards == location.shard)[0]) // self._window_shards
        first = (window + 1) * self._window_shards
        if first >= len(shards):
            shards, first = self._shard_order(location.epoch + 1), 0
        return tuple(shards[first : first + self._window_shards].tolist())

    def _shard_order(self, epoch: int) -> np.ndarray:
        if epoch not in self._shard_orders:
            # A batch may span two epochs, and its next window may belong to a third.
            while len(self._shard_orders) > 2:
                self._shard_orders.pop(next(iter(self._shard_orders)))
            self._shard_orders[epoch] = self._shuffled_shards(self._generator(epoch))
        return self._shard_orders[epoch]

    def _location(self, epoch: int, sample: int) -> SampleLocation:
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return SampleLocation(
            epoch=epoch, shard=shard, index=sample - int(self._starts[shard]), sample=sample
        )

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            while len(self._permutations) > 1:  # a batch spans at most two epochs
                self._permutations.pop(next(iter(self._permutations)))
            self._permutations[epoch] = self._draw(epoch)
        return self._permutations[epoch]

    def _draw(self, epoch: int) -> np.ndarray:
        generator = self._generator(epoch)
        shards_shuffled = self._shuffled_shards(generator)
        window_of_shard = np.empty(len(self._sizes), dtype=np.int64)
        window_of_shard[shards_shuffled] = np.arange(len(self._sizes)) // self._window_shards
        window_of_sample = np.repeat(window_of_shard, self._sizes)
        return np.lexsort((generator.random_raw(self.num_samples), window_of_sample))

    def _generator(self, epoch: int) -> np.random.Philox:
        return np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64))

    def _shuffled_shards(self, generator: np.random.Philox) -> np.ndarray:
        return np.argsort(generator.random_raw(len(self._sizes)), kind="stable")


def caption_choice(seed: int, epoch: int, sample: int, num_captions: int) -> int:
    """Returns the index of the caption to train on in an epoch, the same on every rank.

    Part of the contract.
    """
    if num_captions < 1:
        raise ValueError(f"num_captions={num_captions} must be at least 1 (sample {sample})")
    return _hash("caption", seed, epoch, sample) % num_captions


def uniforms(purpose: str, seed: int, position: int, count: int) -> np.ndarray:
    """Draws `count` float64 numbers in [0, 1) for one random choice at a stream position.

    A pure function, from raw words of numpy's Philox generator. Part of the contract.

    Args:
        purpose: Name of the choice, at most 16 bytes; different names give independent numbers.
        seed: Seed of the run.
        position: Stream position.
        count: How many numbers.
    """
    key = np.array([_hash(purpose, seed, position), 0], dtype=np.uint64)
    return (np.random.Philox(key=key).random_raw(count) >> np.uint64(11)) * 2.0**-53


def _hash(purpose: str, *numbers: int) -> int:
    words = struct.pack(f"<{len(numbers)}Q", *numbers)
    return int.from_bytes(
        hashlib.blake2b(words, digest_size=8, person=purpose.encode()).digest(), "little"
    )
