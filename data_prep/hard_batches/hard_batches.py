"""Brings similar captions into the same global batch: `grouping` has the contract.

A `CaptionGroups` is the last step of a data set's sample order, `Regroup` in `reading/order.py`. It
is a pure function of (seed, epoch, data set, caption vectors, global batch, share, group, window).
World size, micro-batches, loader workers and restarts do not affect it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from tvr.data_prep.hard_batches.caption_vectors import CaptionVectors
from tvr.data_prep.hard_batches.grouping import grouped_order, hard_groups
from tvr.data_prep.mixture import BLOCK, Mixture
from tvr.data_prep.reading.order import caption_choice

BatchStarts = Callable[[int, int], np.ndarray]
"""Positions, of a set's own stream, at which global batches begin: those from the one number to
below the other, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HardBatches:
    """How much of a global batch holds similar captions."""

    share: float
    """Largest share of a batch's positions in hard groups, above 0 and at most 1."""
    group: int
    """Captions of a hard group, at least 2."""
    every: int = 0
    """Epochs for which the same caption vectors hold; 0 = for all."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} (data.hard_batches) must be above 0, at most 1")
        if self.group < 2:
            raise ValueError(f"group={self.group} (data.hard_group) must be at least 2")

    def first_epoch(self, epoch: int) -> int:
        """Returns the first epoch whose caption vectors are those of an epoch."""
        return epoch // self.every * self.every if self.every else 0

    def check(self, global_batch: int) -> None:
        """Raises ValueError if no group fits into a batch."""
        if int(self.share * global_batch / self.group) == 0:
            raise ValueError(
                f"data.hard_batches={self.share} of train.global_batch={global_batch} pairs is less"
                f" than one group of data.hard_group={self.group} captions; give a larger share, a"
                " larger batch, or a smaller group"
            )


class CaptionGroups:
    """Reorders each window of a data set, so that similar captions share a global batch.

    Args:
        vectors: Those of the data set's captions, by the first epoch for which they hold.
        hard: Share and group.
        seed: Seed of the run, by which captions are chosen.
        batch_starts: Where global batches begin in the data set's own stream.
        first_sample: Number of the data set's first sample among those of all training sets.
    """

    def __init__(
        self,
        vectors: Mapping[int, CaptionVectors],
        hard: HardBatches,
        *,
        seed: int,
        batch_starts: BatchStarts,
        first_sample: int = 0,
    ) -> None:
        self._vectors = vectors
        self._hard = hard
        self._seed = seed
        self._batch_starts = batch_starts
        self._first_sample = first_sample

    def __call__(self, epoch: int, first: int, samples: np.ndarray) -> np.ndarray:
        """Returns the new order of a window's samples.

        Args:
            epoch: Epoch of the window.
            first: The window's first position in the data set's own stream.
            samples: (M,) rows of the data set, in their order.

        Raises:
            LookupError: the vectors of this epoch are not there.
        """
        vectors = self._vectors.get(self._hard.first_epoch(epoch))
        if vectors is None:
            raise LookupError(f"no caption vectors for data.hard_batches in epoch {epoch}")
        end = first + len(samples)
        inside = self._batch_starts(first + 1, end)
        bounds = np.concatenate([[first], inside, [end]]) - first
        starts = hard_groups(bounds, self._hard.share, self._hard.group)
        captions = vectors.of(samples, self._choices(epoch, samples, vectors))
        return grouped_order(captions, starts, self._hard.group)

    def _choices(self, epoch: int, samples: np.ndarray, vectors: CaptionVectors) -> np.ndarray:
        """The caption that training will take of each sample."""
        counts = vectors.num_captions(samples)
        choices = np.zeros(len(samples), np.int64)
        for number in np.flatnonzero(counts > 1).tolist():
            sample = self._first_sample + int(samples[number])
            choices[number] = caption_choice(self._seed, epoch, sample, int(counts[number]))
        return choices


def caption_groups(
    vectors: Mapping[str, Mapping[int, CaptionVectors]],
    hard: HardBatches,
    *,
    seed: int,
    global_batch: int,
    mixture: Mixture | None,
) -> dict[str, CaptionGroups]:
    """Returns the last step of the order of each training set, by its name.

    Args:
        vectors: Those of each set by its name, see `CaptionGroups`; a single set's may be empty.
        hard: Share and group.
        seed: Seed of the run.
        global_batch: Pairs per step on all ranks together.
        mixture: How several sets are mixed; None = a single set.
    """
    names = sorted(vectors)
    counts = [next(iter(vectors[name].values())).num_samples for name in names]
    groups = {}
    for name, first in zip(names, accumulate([0, *counts[:-1]]), strict=True):
        starts = (
            every_batch(global_batch)
            if mixture is None
            else batches_of_set(mixture, name, global_batch)
        )
        groups[name] = CaptionGroups(
            vectors[name], hard, seed=seed, batch_starts=starts, first_sample=first
        )
    return groups


def every_batch(global_batch: int) -> BatchStarts:
    """Where global batches begin in the stream of a single set."""
    return lambda start, stop: np.arange(
        -(-start // global_batch) * global_batch, stop, global_batch
    )


def batch_of(position: int, global_batch: int, mixture: Mixture | None, name: str) -> int:
    """Returns the number of the global batch that holds a position of a set's own stream."""
    if mixture is None:
        return position // global_batch
    block = position // mixture.quotas[mixture.names.index(name)]
    first, last = block * BLOCK // global_batch, ((block + 1) * BLOCK - 1) // global_batch
    # The last of these batches that begins at or before the position.
    batches = range(first, last + 1)
    before = bisect_right(batches, position, key=lambda k: mixture.drawn(k * global_batch)[name])
    return batches[max(0, before - 1)]


def batches_of_set(mixture: Mixture, name: str, global_batch: int) -> BatchStarts:
    """Where global batches begin in the own stream of one of several sets."""
    quota = mixture.quotas[mixture.names.index(name)]

    def starts(start: int, stop: int) -> np.ndarray:
        # The mixture's blocks that hold these positions.
        first, end = start // quota * BLOCK, (stop // quota + 1) * BLOCK
        batches = range(-(-first // global_batch), end // global_batch + 1)
        found = np.array([mixture.drawn(k * global_batch)[name] for k in batches], np.int64)
        return np.unique(found[(found >= start) & (found < stop)])

    return starts
