"""Which rank reads which positions, and which node downloads which shards.

The positions of a micro-step go to the ranks by their place in the window (`SampleOrder`): rank r
of W reads samples whose place is about [r / W, (r + 1) / W), in every batch of the window. The
ranks of a node are consecutive, so a node reads few shards of each window, and few of those are
read by another node as well. The global batch holds the same samples for every number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvr.data_prep.reading.order import SampleLocation, SampleOrder


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

    def span(self, micro_step: int) -> tuple[int, int]:
        """First stream position of a micro-step on all ranks, and the one after its last."""
        pairs = self.world_size * self.micro_batch
        return micro_step * pairs, (micro_step + 1) * pairs

    def samples(self, order: SampleOrder, micro_step: int) -> list[tuple[int, SampleLocation]]:
        """Returns this rank's positions of a micro-step, ascending, and the samples there."""
        start, stop = self.span(micro_step)
        found = order.locate_range(start, stop)
        own = assigned(found.place, self.rank, self.world_size)
        return list(zip((start + own).tolist(), found.take(own), strict=True))


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
    by_place = np.argsort(places, kind="stable")
    first, end = (len(places) * r // world_size for r in (rank, rank + 1))
    return np.sort(by_place[first:end])


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
