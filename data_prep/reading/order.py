"""The sample order: a pure function of (seed, epoch, shard sizes, window size, stream position).

THE CONTRACT. For a data set of N samples in S shards, stream position p belongs to epoch p // N.
An epoch is a permutation of all samples:

1. The epoch's shards are shuffled: sorted stably by S random words.
2. They are dealt, in this order, into max(1, round(S / window_shards)) windows. Window w of K takes
   the shards from S w // K to S (w + 1) // K. An epoch reads one window after the other.
3. Within a window the samples of each shard are shuffled: sorted stably by n random words for a
   shard of n samples. Sample j of this order gets the key (j + u) / n, with u uniform in [0, 1)
   from n more words. The samples of the window are sorted stably by key. Any run of positions in a
   window therefore holds samples of each shard in proportion to the shard's size.

All random numbers are raw 64-bit words of numpy's Philox generator with the key (seed, epoch). The
generator is based on a counter, whose third word is 0 for the shuffle of shards and 1 + s for shard
s: each shard's numbers can be drawn without any others. numpy's own shuffles are avoided, because
their results may change between releases. World size, loader workers and restarts do not affect
the order. `window_shards` gives the window's size, a function of the global batch.

Only windows in use are held: time and memory do not depend on N. `hard_batches` may reorder them.

Changing any number of this module changes the data of every resumed run. Such a change needs the
label "order break" in the change log and new golden positions in the tests.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

# A window holds at least so many shards, so that a small batch mixes several.
MIN_WINDOW_SHARDS = 16
# Large batches take few samples of each shard. A node of 256 pairs then reads about 4 shards of a
# window, and the shards that nodes have in common stay a small part.
PAIRS_PER_SHARD = 64
# A batch may lie in two windows.
HELD_WINDOWS = 2
# A batch may span two epochs, and its next window may belong to a third.
HELD_EPOCHS = 3

# (epoch, first position, samples of a window in order) -> their new order, see `hard_batches`.
Regroup: TypeAlias = Callable[[int, int, np.ndarray], np.ndarray]


def window_shards(global_batch: int, num_shards: int) -> int:
    """Returns the number of shards of a window, for a global batch and a data set.

    Part of the contract. It depends on nothing that a restart may change.
    """
    return min(num_shards, max(MIN_WINDOW_SHARDS, -(-global_batch // PAIRS_PER_SHARD)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLocation:
    """The sample that is read at a stream position."""

    epoch: int
    shard: int
    index: int
    """Row within the shard."""
    sample: int
    """Row within the data set (manifest row)."""
    place: float
    """Row within the window's shards, laid end to end, over the window's samples: in [0, 1)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleLocations:
    """The samples of a range of stream positions: one array for each field of SampleLocation."""

    epoch: np.ndarray
    shard: np.ndarray
    index: np.ndarray
    sample: np.ndarray
    place: np.ndarray

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, number: int) -> SampleLocation:
        return SampleLocation(**{name: getattr(self, name)[number].item() for name in _COLUMNS})

    def __iter__(self) -> Iterator[SampleLocation]:
        return (self[number] for number in range(len(self)))

    def take(self, numbers: np.ndarray) -> SampleLocations:
        """Returns the samples with these numbers in the range."""
        return SampleLocations(**{name: getattr(self, name)[numbers] for name in _COLUMNS})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OrderWindow:
    """A window of an epoch: the shards that are read together."""

    epoch: int
    number: int
    first: int
    """First stream position."""
    shards: np.ndarray
    """Numbers of the window's shards."""
    starts: np.ndarray
    """First row of each shard when the window's shards lie end to end, then the number of rows."""

    @property
    def num_samples(self) -> int:
        """Samples of the window."""
        return int(self.starts[-1])

    @property
    def end(self) -> int:
        """The stream position after the last one."""
        return self.first + self.num_samples


@dataclass(frozen=True, slots=True, eq=False)
class _Epoch:
    shards: np.ndarray
    """All shards, shuffled."""
    starts: np.ndarray
    """First position of each window within the epoch, then the number of samples."""


class SampleOrder:
    """The order of one data set under one seed.

    Holds the samples of `HELD_WINDOWS` windows and the shards of `HELD_EPOCHS` epochs at most.

    Args:
        shard_sizes: Samples of each shard.
        seed: Seed of the run.
        window_shards: Shards of a window, see the function of that name.
        regroup: Reorders the samples of each window as a pure function; None = rule 3 alone.

    Raises:
        ValueError: an argument is out of range, or there are no samples.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        window_shards: int = MIN_WINDOW_SHARDS,
        regroup: Regroup | None = None,
    ) -> None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed} must be from 0 to 2**63 - 1")
        if window_shards < 1:
            raise ValueError(f"window_shards={window_shards} must be at least 1")
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        if (sizes < 0).any() or sizes.sum() == 0:
            raise ValueError(
                f"shard sizes {list(shard_sizes)[:8]}... hold no samples; expected at least one"
            )
        self.seed = seed
        self.num_samples = int(sizes.sum())
        self.num_shards = len(sizes)
        self.num_windows = max(1, round(len(sizes) / window_shards))
        self._regroup = regroup
        self._sizes = sizes
        self._starts = _starts(sizes)
        self._epochs: dict[int, _Epoch] = {}
        self._drawn: dict[tuple[int, int], np.ndarray] = {}

    def locate(self, position: int) -> SampleLocation:
        """Returns the sample at a stream position; positions start at 0 and have no end."""
        return self.locate_range(position, position + 1)[0]

    def locate_range(self, start: int, stop: int) -> SampleLocations:
        """Returns the samples at the stream positions from `start` to below `stop`."""
        parts, at = [], start
        while at < stop:
            window = self.window_at(at)
            parts.append(self._located(window, at - window.first, stop - window.first))
            at = min(stop, window.end)
        if len(parts) == 1:
            return parts[0]
        columns = {
            name: np.concatenate([np.empty(0, dtype), *(getattr(p, name) for p in parts)])
            for name, dtype in _COLUMNS.items()
        }
        return SampleLocations(**columns)

    def substitute(self, position: int, attempt: int) -> SampleLocation:
        """Returns the sample that replaces a bad sample at `position`.

        The choice is uniform over the data set, by blake2b of (seed, position, attempt), so every
        rank and every restart makes the same choice. The substitute may already be in the batch.
        It takes the place of the sample that it replaces.

        Args:
            position: Stream position of the bad sample.
            attempt: 1 for the first substitute, 2 if that is bad as well, and so on.
        """
        if attempt < 1:
            raise ValueError(f"attempt={attempt} must be at least 1")
        sample = _hash("substitute", self.seed, position, attempt) % self.num_samples
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return SampleLocation(
            epoch=position // self.num_samples,
            shard=shard,
            index=sample - int(self._starts[shard]),
            sample=sample,
            place=self.locate(position).place,
        )

    def window_at(self, position: int) -> OrderWindow:
        """Returns the window of a stream position, without drawing its samples."""
        epoch, step = divmod(position, self.num_samples)
        number = np.searchsorted(self._epoch(epoch).starts, step, side="right") - 1
        return self._window(epoch, int(number))

    def next_window(self, window: OrderWindow) -> OrderWindow:
        """Returns the window that is read next; the last one is followed by the next epoch's."""
        return self.window_at(window.end)

    def windows_in_use(self, start: int, stop: int) -> tuple[list[OrderWindow], list[OrderWindow]]:
        """Returns the windows of the positions from `start` to below `stop`, and the next one."""
        windows = [self.window_at(start)]
        while windows[-1].end < stop:
            windows.append(self.next_window(windows[-1]))
        return windows, [self.next_window(windows[-1])]

    def _window(self, epoch: int, number: int) -> OrderWindow:
        drawn = self._epoch(epoch)
        first, end = (len(drawn.shards) * w // self.num_windows for w in (number, number + 1))
        shards = drawn.shards[first:end]
        return OrderWindow(
            epoch=epoch,
            number=number,
            first=epoch * self.num_samples + int(drawn.starts[number]),
            shards=shards,
            starts=_starts(self._sizes[shards]),
        )

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            words = _random_words(self.seed, epoch, 0, len(self._sizes))
            shards = np.argsort(words, kind="stable")
            bounds = np.arange(self.num_windows + 1) * len(shards) // self.num_windows
            _make_room(self._epochs, HELD_EPOCHS)
            self._epochs[epoch] = _Epoch(shards, _starts(self._sizes[shards])[bounds])
        return self._epochs[epoch]

    def _located(self, window: OrderWindow, start: int, stop: int) -> SampleLocations:
        rows = self._rows(window)[start:stop].astype(np.int64)
        member = np.searchsorted(window.starts, rows, side="right") - 1
        shard = window.shards[member]
        index = rows - window.starts[member]
        return SampleLocations(
            epoch=np.full(len(rows), window.epoch, np.int64),
            shard=shard,
            index=index,
            sample=self._starts[shard] + index,
            place=rows / window.num_samples,
        )

    def _rows(self, window: OrderWindow) -> np.ndarray:
        """The window's rows in the order of positions."""
        name = window.epoch, window.number
        rows = self._drawn.pop(name, None)
        if rows is None:
            _make_room(self._drawn, HELD_WINDOWS)
            rows = self._draw(window)
            if self._regroup is not None:
                first_rows = self._starts[window.shards] - window.starts[:-1]
                samples = rows + np.repeat(first_rows, np.diff(window.starts))[rows]
                rows = rows[self._regroup(window.epoch, window.first, samples)]
        self._drawn[name] = rows  # the last one is the most recently used
        return rows

    def _draw(self, window: OrderWindow) -> np.ndarray:
        rows = np.empty(window.num_samples, np.uint32)
        keys = np.empty(len(rows), np.float64)
        for member, shard in enumerate(window.shards.tolist()):
            first, end = window.starts[member : member + 2].tolist()
            size = end - first
            words = _random_words(self.seed, window.epoch, 1 + shard, 2 * size)
            rows[first:end] = first + np.argsort(words[:size], kind="stable")
            keys[first:end] = (np.arange(size) + _unit(words[size:])) / size
        return rows[np.argsort(keys, kind="stable")]


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
    return _unit(np.random.Philox(key=key).random_raw(count))


def _hash(purpose: str, *numbers: int) -> int:
    words = struct.pack(f"<{len(numbers)}Q", *numbers)
    return int.from_bytes(
        hashlib.blake2b(words, digest_size=8, person=purpose.encode()).digest(), "little"
    )


_COLUMNS = {
    "epoch": np.int64,
    "shard": np.int64,
    "index": np.int64,
    "sample": np.int64,
    "place": np.float64,
}


def _random_words(seed: int, epoch: int, stream: int, count: int) -> np.ndarray:
    """Draws all random words of the order: `count` uint64 of a stream that none other overlaps."""
    generator = np.random.Philox(
        key=np.array([seed, epoch], dtype=np.uint64),
        counter=np.array([0, 0, stream, 0], dtype=np.uint64),
    )
    return generator.random_raw(count)


def _unit(words: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from random words."""
    return (words >> np.uint64(11)) * 2.0**-53


def _starts(sizes: np.ndarray) -> np.ndarray:
    """First row of each part when parts of these sizes lie end to end, then the total."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


def _make_room(held: dict, most: int) -> None:
    while len(held) >= most:
        held.pop(next(iter(held)))
