"""Which rank reads which positions, and which node downloads which shards.

The positions of a micro-step go to the ranks by their place in the window (`SampleOrder`): rank r
of W reads samples whose place is about [r / W, (r + 1) / W), in every batch of the window. The
ranks of a node are consecutive, so a node reads few shards of each window, and few of those are
read by another node as well. The global batch holds the same samples for every number of ranks.

A node downloads the shards that it owns whole into its cache. `CacheNeed` says how much room they
take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tvr.data_prep.reading.order import (
    OrderWindow,
    SampleLocation,
    SampleLocations,
    SampleOrder,
)

if TYPE_CHECKING:
    # A simulation uses this module without the readers, which import video decoders.
    from tvr.data_prep.dataset.manifest import Shard

# Batches that a loader worker prepares ahead: torch's default for DataLoader.
PREFETCH_FACTOR = 2
# Shards that evaluation, which reads the shards in order, downloads ahead.
PREFETCHED_SHARDS = 2
# The ranks of a node may be so many micro-steps apart: one is in its next step, and its next batch
# is on the way to the device.
RANK_SKEW = 3
# Windows of which the need of a cache is known.
CHECKED_EPOCHS, CHECKED_WINDOWS = 4, 1000


@dataclass(frozen=True, slots=True)
class CacheNeed:
    """Bytes of the shards of a data set that a node's processes have in use at the same time."""

    least: int
    """Bytes of the shards that are read."""
    full: int
    """With those that are downloaded ahead."""

    def __add__(self, other: CacheNeed) -> CacheNeed:
        return CacheNeed(self.least + other.least, self.full + other.full)


NOTHING_NEEDED = CacheNeed(0, 0)


class WindowedOrder(Protocol):
    """An order of one data set or of several: see `SampleOrder`."""

    def locate_range(self, start: int, stop: int) -> SampleLocations:
        """Returns the samples of a range of stream positions."""
        ...

    def windows_in_use(self, start: int, stop: int) -> tuple[list[OrderWindow], list[OrderWindow]]:
        """Returns the windows of a range of stream positions, and those that are read next."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """What one rank reads of every micro-step.

    Micro-step m of W ranks with micro-batches of b pairs consumes the stream positions
    [m W b, (m + 1) W b). It is numbered from the start of the stream, not of the step.
    """

    rank: int
    world_size: int
    micro_batch: int
    node: range
    """The ranks of this rank's node."""

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank={self.rank} must be from 0 to world_size - 1 = {self.world_size - 1}"
            )
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch={self.micro_batch} must be at least 1")
        node = self.node
        if node.step != 1 or self.rank not in node or node.start < 0 or node.stop > self.world_size:
            raise ValueError(
                f"node={node} must be consecutive ranks of {self.world_size}, rank={self.rank}"
                " among them"
            )

    def micro_steps(self, global_batch: int) -> int:
        """Returns the micro-steps of a step.

        Raises:
            ValueError: the global batch is no multiple of what all ranks read in one.
        """
        unit = self.micro_batch * self.world_size
        if global_batch < unit or global_batch % unit:
            nearest = max(1, round(global_batch / unit)) * unit
            raise ValueError(
                f"global_batch={global_batch} must be a multiple of micro_batch x world_size ="
                f" {self.micro_batch} x {self.world_size}; the nearest is {nearest}"
            )
        return global_batch // unit

    def span(self, micro_step: int) -> tuple[int, int]:
        """First stream position of a micro-step on all ranks, and the one after its last."""
        pairs = self.world_size * self.micro_batch
        return micro_step * pairs, (micro_step + 1) * pairs

    def samples(self, order: WindowedOrder, micro_step: int) -> list[tuple[int, SampleLocation]]:
        """Returns this rank's positions of a micro-step, ascending, and the samples there."""
        start, stop = self.span(micro_step)
        found = order.locate_range(start, stop)
        own = assigned(found.place, self.rank, self.world_size)
        return list(zip((start + own).tolist(), found.take(own), strict=True))

    def shards(self, order: WindowedOrder, micro_step: int) -> tuple[list[int], list[int]]:
        """Returns the shards that the node owns in a micro-step's windows, and in those after."""
        current, upcoming = (
            [
                shard
                for window in windows
                for shard in window.shards[
                    owned(window.starts, self.node, self.world_size)
                ].tolist()
            ]
            for windows in order.windows_in_use(*self.span(micro_step))
        )
        return current, upcoming


def assigned(places: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Returns which of a micro-step's positions a rank reads.

    The positions are sorted by (place, position) and dealt out in equal runs; a rank reads its run
    in the order of positions. One rank alone reads all positions.

    Args:
        places: (world_size x micro_batch,) places of the micro-step's consecutive positions.
        rank: This rank.
        world_size: Number of ranks.

    Returns:
        (micro_batch,) indices into `places`, ascending.
    """
    first, end = (len(places) * r // world_size for r in (rank, rank + 1))
    # Only the run itself is sorted: a thousand ranks would sort all places a thousand times.
    bounds = np.partition(places, (first, end - 1))
    candidates = np.flatnonzero((bounds[first] <= places) & (places <= bounds[end - 1]))
    by_place = candidates[np.argsort(places[candidates], kind="stable")]
    # Of equal places at the lower bound, some may belong to lower ranks.
    skipped = first - np.count_nonzero(places < bounds[first])
    return np.sort(by_place[skipped : skipped + end - first])


def dealt(places: np.ndarray, world_size: int) -> np.ndarray:
    """Returns what every rank reads: (world_size, micro_batch), whose rows are those of `assigned`.

    The number of places must be a multiple of `world_size`.
    """
    by_place = np.argsort(places, kind="stable")
    return np.sort(by_place.reshape(world_size, -1), axis=1)


def owned(starts: np.ndarray, node: range, world_size: int) -> np.ndarray:
    """Returns which shards a node downloads whole; it reads samples of the others one by one.

    A node owns a shard if at least half of the shard's samples have places of the node's ranks. If
    two nodes hold one half each, the second owns it. So no shard has two owners. A shard of which
    no node holds half has none: most of a download would be for a few samples.

    Args:
        starts: (shards + 1,) first row of each shard, then the number of rows: those of an
            `OrderWindow`, or of a data set whose ranks read equal shares in order.
        node: The node's ranks.
        world_size: Number of ranks.

    Returns:
        (shards,) bool.
    """
    # In integers, so that every node decides alike: rows times world_size.
    first, end = starts[:-1] * world_size, starts[1:] * world_size
    node_first, node_end = (int(starts[-1]) * rank for rank in (node.start, node.stop))
    inside = np.minimum(end, node_end) - np.maximum(first, node_first)
    middle_is_here = (2 * node_first <= first + end) & (first + end < 2 * node_end)
    return (2 * inside >= end - first) & middle_is_here


def training_need(
    shards: Sequence[Shard],
    order: SampleOrder,
    share: RankShare,
    workers: int,
    *,
    part: float = 1.0,
) -> CacheNeed:
    """Returns the room that a training set needs in a node's cache.

    It is the largest need in the first epochs, and one shard more, since a later window may be a
    little larger.

    Args:
        shards: Shards of the data set.
        order: Its order.
        share: The share of a rank of the node.
        workers: Loader processes per rank.
        part: Part of the stream's positions that read this data set.
    """
    num_bytes = np.array([shard.shard_bytes for shard in shards])
    window, owned_bytes, samples = order.window_at(0), [], []
    for _ in range(min(CHECKED_EPOCHS * order.num_windows, CHECKED_WINDOWS)):
        is_owned = owned(window.starts, share.node, share.world_size)
        owned_bytes.append(num_bytes[window.shards[is_owned]].sum())
        samples.append(window.num_samples)
        window = order.next_window(window)
    # The positions between the oldest and the newest batch that a worker of the node prepares.
    micro_steps = PREFETCH_FACTOR * workers + 1 + RANK_SKEW
    span = math.ceil(micro_steps * share.world_size * share.micro_batch * part)
    num_windows = 1 + math.ceil((span - 1) / min(samples))
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(owned_bytes)])
    least, full = (
        int((sums[min(count, len(samples)) :] - sums[: -min(count, len(samples))]).max())
        for count in (num_windows, num_windows + 1)
    )
    total, more = int(num_bytes.sum()), int(num_bytes.max())
    return CacheNeed(min(total, least + more), min(total, full + more))


def evaluation_need(shards: Sequence[Shard], share: RankShare, workers: int) -> CacheNeed:
    """Returns the room that a data set read in order, each rank its share, needs in a node's cache.

    Args: see `training_need`.
    """
    starts = np.cumsum([0, *(shard.num_samples for shard in shards)])
    is_owned = owned(starts, share.node, share.world_size)
    num_bytes = np.sort([s.shard_bytes for s, own in zip(shards, is_owned, strict=True) if own])
    # Of consecutive shards, a rank's workers read so many at once: those of their batches.
    span = (PREFETCH_FACTOR * workers + 1) * share.micro_batch
    last = np.searchsorted(starts, starts[1:] - 1 + (span - 1), side="right") - 1
    count = int((np.minimum(last, len(shards) - 1) - np.arange(len(shards))).max()) + 1
    least, full = (
        int(num_bytes[::-1][: len(share.node) * each].sum())
        for each in (count, count + PREFETCHED_SHARDS)
    )
    return CacheNeed(least, full)
