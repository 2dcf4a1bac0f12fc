"""What every rank reads at every micro-step, from the sample order and its division among ranks.

Only reads that may need the store are listed: the first read of an owned shard in a batch, and
every read of a shard that another node owns. All others find their shard in the node's cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tvr.data_prep.reading.locality import dealt, owned
from tvr.data_prep.reading.order import OrderWindow, SampleLocations, SampleOrder

# Positions that are drawn at once, for as many micro-steps as they fill.
CHUNK_POSITIONS = 1 << 19
# Workers of fast ranks run ahead of slow ones by a few batches only.
MAX_CHUNKS = 4


class Read(NamedTuple):
    """A read of a batch that may need the store."""

    shard: int
    window: int
    """Number of the window, counted over all epochs."""
    num_bytes: int
    """Of the sample."""
    is_owned: bool
    """Whether this node downloads the whole shard."""


class OwnedShards(NamedTuple):
    """What a node downloads whole for a micro-step."""

    current: Sequence[int]
    """Shards that it owns of the windows that are read."""
    both: Sequence[int]
    """These, and those of the window after them."""
    upcoming: Sequence[tuple[int, int]]
    """The shards of the window after them, each with the number of the window."""


class ReadingPlan:
    """The reads of all ranks from a stream position on.

    Args:
        order: Order of the samples.
        sample_bytes: Gives the bytes of the samples in these manifest rows.
        first_position: First stream position.
        num_micro_steps: Where the plan ends.
        world_size: Number of ranks.
        ranks_per_node: Ranks of a node; the last one may have fewer.
        micro_batch: Pairs per batch of a rank.
    """

    def __init__(
        self,
        order: SampleOrder,
        sample_bytes: Callable[[np.ndarray], np.ndarray],
        *,
        first_position: int,
        num_micro_steps: int,
        world_size: int,
        ranks_per_node: int,
        micro_batch: int,
    ) -> None:
        self._order = order
        self._sample_bytes = sample_bytes
        self._first_position = first_position
        self._num_micro_steps = num_micro_steps
        self._world_size = world_size
        self._micro_batch = micro_batch
        self.pairs = world_size * micro_batch
        self.node_ranks = [
            range(first, min(first + ranks_per_node, world_size))
            for first in range(0, world_size, ranks_per_node)
        ]
        self._node_of_rank = np.arange(world_size) // ranks_per_node
        self._steps_per_chunk = max(1, CHUNK_POSITIONS // self.pairs)
        self._chunks: OrderedDict[int, list[list[Read]]] = OrderedDict()
        self._of_windows: dict[int, list[list[int]]] = {}
        self._owned: dict[tuple[tuple[int, ...], ...], list[OwnedShards]] = {}
        self._in_use: dict[int, list[OwnedShards]] = {}

    def reads(self, micro_step: int, rank: int) -> Sequence[Read]:
        """The reads of a rank's batch, in order; micro-steps count from the first position."""
        number, step = divmod(micro_step, self._steps_per_chunk)
        if number not in self._chunks:
            if len(self._chunks) >= MAX_CHUNKS:
                self._chunks.popitem(last=False)
            self._chunks[number] = self._draw(number)
        return self._chunks[number][step * self._world_size + rank]

    def number(self, window: OrderWindow) -> int:
        """The number of a window, counted over all epochs."""
        return window.epoch * self._order.num_windows + window.number

    def owned_shards(self, micro_step: int, node: int) -> OwnedShards:
        """The shards that a node downloads for a micro-step, and in advance."""
        if micro_step not in self._in_use:
            start = self._first_position + micro_step * self.pairs
            current, upcoming = self._order.windows_in_use(start, start + self.pairs)
            numbers = tuple(map(self.number, current)), tuple(map(self.number, upcoming))
            if numbers not in self._owned:
                self._owned[numbers] = self._of_nodes(current, upcoming)
            self._in_use[micro_step] = self._owned[numbers]
        return self._in_use[micro_step][node]

    def _of_nodes(
        self, current: Sequence[OrderWindow], upcoming: Sequence[OrderWindow]
    ) -> list[OwnedShards]:
        found = []
        for node in range(len(self.node_ranks)):
            now = [shard for window in current for shard in self._of_window(window)[node]]
            later = [
                (shard, self.number(window))
                for window in upcoming
                for shard in self._of_window(window)[node]
            ]
            found.append(OwnedShards(now, [*now, *(shard for shard, _ in later)], later))
        return found

    def _of_window(self, window: OrderWindow) -> list[list[int]]:
        """The shards of a window that each node owns."""
        number = self.number(window)
        if number not in self._of_windows:
            self._of_windows[number] = [
                window.shards[owned(window.starts, ranks, self._world_size)].tolist()
                for ranks in self.node_ranks
            ]
        return self._of_windows[number]

    def _draw(self, number: int) -> list[list[Read]]:
        """The reads of a chunk of micro-steps, by (micro-step, rank)."""
        first_step = number * self._steps_per_chunk
        num_steps = min(self._steps_per_chunk, self._num_micro_steps - first_step)
        start = self._first_position + first_step * self.pairs
        found = self._order.locate_range(start, start + num_steps * self.pairs)
        # (micro-step, rank, sample) -> index into `found`
        taken = np.stack(
            [
                step * self.pairs + dealt(places, self._world_size)
                for step, places in enumerate(found.place.reshape(num_steps, self.pairs))
            ]
        )
        shards = found.shard[taken].ravel()
        windows, owners = (column[taken].ravel() for column in self._of_positions(start, found))
        batches = np.arange(len(shards)) // self._micro_batch
        is_owned = owners == self._node_of_rank[batches % self._world_size]
        # Of the reads of an owned shard, only the first in a batch may need the store.
        ours = np.flatnonzero(is_owned)
        names = batches[ours] * (int(shards.max()) + 1) + shards[ours]
        first = ours[np.unique(names, return_index=True)[1]]
        listed = np.sort(np.concatenate([first, np.flatnonzero(~is_owned)]))
        num_bytes = self._sample_bytes(found.sample[taken].ravel()[listed])
        columns = (shards[listed], windows[listed], num_bytes, is_owned[listed])
        reads = list(map(Read, *(column.tolist() for column in columns)))
        ends = np.searchsorted(batches[listed], np.arange(batches[-1] + 2))
        return [
            reads[first:end]
            for first, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        ]

    def _of_positions(self, start: int, found: SampleLocations) -> tuple[np.ndarray, np.ndarray]:
        """The window, and the node that owns the shard or -1, of each position from `start` on."""
        windows, owners = np.empty((2, len(found)), np.int64)
        at = start
        while at < start + len(found):
            window = self._order.window_at(at)
            here = slice(at - start, window.end - start)
            owner_of_shard = np.full(int(window.shards.max()) + 1, -1)
            for node, shards in enumerate(self._of_window(window)):
                owner_of_shard[shards] = node
            windows[here] = self.number(window)
            owners[here] = owner_of_shard[found.shard[here]]
            at = window.end
        return windows, owners
