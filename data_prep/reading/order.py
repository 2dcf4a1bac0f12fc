"""The sample order: a pure function of (seed, epoch, shard sizes, stream position).

THE CONTRACT. Stream position p lies in epoch p // N for a data set of N samples; an epoch is a
permutation of all
samples: the shards are shuffled, then the samples inside each window of `window_shards` shards, so
that a reader walks few shards at a time. All draws are raw 64-bit words of numpy's Philox keyed on
(seed, epoch), sorted with ties in place; numpy's own shuffles are avoided, since their streams may
change between its releases. World size, loader workers and restarts do not enter. Any change of the
numbers given here breaks the order of every resumed run: it needs the label "order break" in the
change log and new golden positions in the tests.
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
    """Where a stream position reads."""

    epoch: int
    shard: int
    index: int
    """Of the sample within its shard."""
    sample: int
    """Of the sample within the data set: manifest row."""


class SampleOrder:
    """The order of one data set under one seed; remembers the permutations of two epochs at
    most."""

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
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._window_shards = window_shards
        self._epochs: dict[int, np.ndarray] = {}
        self._shard_orders: dict[int, np.ndarray] = {}

    def locate(self, position: int) -> SampleLocation:
        """The sample read at a stream position, 0 or more, without end."""
        epoch, step = divmod(position, self.num_samples)
        return self._place(epoch, int(self._permutation(epoch)[step]))

    def substitute(self, position: int, attempt: int) -> SampleLocation:
        """The sample read instead when the sample at `position` is bad; attempt = 1, 2, ... until
        one is good.

        A draw from the whole data set by blake2b of (seed, position, attempt), so every rank and
        every restart makes the same choice. It may equal a sample elsewhere in the batch.
        """
        if attempt < 1:
            raise ValueError(f"attempt={attempt} must be at least 1")
        return self._place(
            position // self.num_samples,
            _hash("substitute", self.seed, position, attempt) % self.num_samples,
        )

    def next_window_shards(self, place: SampleLocation) -> tuple[int, ...]:
        """The shards of the window after the one that a place lies in; after an epoch's last window
        comes the first of the next."""
        shards = self._shard_order(place.epoch)
        window = int(np.flatnonzero(shards == place.shard)[0]) // self._window_shards
        first = (window + 1) * self._window_shards
        if first >= len(shards):
            shards, first = self._shard_order(place.epoch + 1), 0
        return tuple(shards[first : first + self._window_shards].tolist())

    def _shard_order(self, epoch: int) -> np.ndarray:
        if epoch not in self._shard_orders:
            while len(self._shard_orders) > 2:  # of a batch that spans two epochs, and the next
                self._shard_orders.pop(next(iter(self._shard_orders)))
            self._shard_orders[epoch] = self._shuffled_shards(self._bits(epoch))
        return self._shard_orders[epoch]

    def _place(self, epoch: int, sample: int) -> SampleLocation:
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return SampleLocation(
            epoch=epoch, shard=shard, index=sample - int(self._starts[shard]), sample=sample
        )

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # a batch spans two epochs at most; drop the oldest
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = self._draw(epoch)
        return self._epochs[epoch]

    def _draw(self, epoch: int) -> np.ndarray:
        bits = self._bits(epoch)
        shards_shuffled = self._shuffled_shards(bits)
        window_of_shard = np.empty(len(self._sizes), dtype=np.int64)
        window_of_shard[shards_shuffled] = np.arange(len(self._sizes)) // self._window_shards
        window_of_sample = np.repeat(window_of_shard, self._sizes)
        return np.lexsort((bits.random_raw(self.num_samples), window_of_sample))

    def _bits(self, epoch: int) -> np.random.Philox:
        return np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64))

    def _shuffled_shards(self, bits: np.random.Philox) -> np.ndarray:
        return np.argsort(bits.random_raw(len(self._sizes)), kind="stable")


def caption_choice(seed: int, epoch: int, sample: int, num_captions: int) -> int:
    """Which of a sample's captions an epoch trains on; the same on every rank. Part of the
    contract."""
    if num_captions < 1:
        raise ValueError(f"num_captions={num_captions} must be at least 1 (sample {sample})")
    return _hash("caption", seed, epoch, sample) % num_captions


def uniforms(purpose: str, seed: int, position: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64, for one random choice at a stream position.

    `purpose` names the choice in 16 bytes at most. Like the order itself a pure function, of
    numpy's raw Philox words. Part of the contract.
    """
    key = np.array([_hash(purpose, seed, position), 0], dtype=np.uint64)
    return (np.random.Philox(key=key).random_raw(count) >> np.uint64(11)) * 2.0**-53


def _hash(purpose: str, *numbers: int) -> int:
    words = struct.pack(f"<{len(numbers)}Q", *numbers)
    return int.from_bytes(
        hashlib.blake2b(words, digest_size=8, person=purpose.encode()).digest(), "little"
    )
