"""The processes of a run: ranks that train, loader workers that read, and prefetch threads."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tvr.data_prep.reading.cache_folder import evicted
from tvr.data_prep.reading.locality import PREFETCH_FACTOR
from tvr.data_prep.reading.node_cache import CHUNK_BYTES
from tvr.data_prep.simulation.clock import Process, Signal, SimulatedClock
from tvr.data_prep.simulation.fake_store import FakeStore, NodeLink
from tvr.data_prep.simulation.reading_plan import OwnedShards, Read, ReadingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderShape:
    """Ranks and loader workers of a run."""

    world_size: int
    ranks_per_node: int
    workers: int
    """Loader workers of a rank; 0 = each rank reads by itself, when it needs a batch."""
    micro_batch: int
    micro_step_s: float
    """Seconds that a micro-step computes."""
    decode_s: float
    """Seconds that a worker needs for a sample, from bytes to tensor."""

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // self.ranks_per_node)


@dataclass(slots=True)
class Traffic:
    """Requests and bytes from the store, by the window of their shards."""

    downloads: Counter[int] = field(default_factory=Counter)
    """Whole shards."""
    chunk_requests: Counter[int] = field(default_factory=Counter)
    """Requests of these downloads."""
    download_bytes: Counter[int] = field(default_factory=Counter)
    sample_requests: Counter[int] = field(default_factory=Counter)
    """Samples read by one range request each."""
    sample_bytes: Counter[int] = field(default_factory=Counter)


class SimulatedNode:
    """The shard cache of a node, without bytes, and the node's link to the store.

    Args:
        clock, store, traffic: Shared by all nodes.
        shard_bytes: Bytes of each shard.
        max_bytes: Limit of the cache; None = no cache.
        downloads_ahead: Whether the cache has room for the shards that are read next.
    """

    def __init__(
        self,
        clock: SimulatedClock,
        store: FakeStore,
        traffic: Traffic,
        shard_bytes: Sequence[int],
        max_bytes: int | None,
        downloads_ahead: bool,
    ) -> None:
        self._clock = clock
        self._store = store
        self._traffic = traffic
        self._shard_bytes = shard_bytes
        self._max_bytes = max_bytes
        self._downloads_ahead = downloads_ahead
        self._link = NodeLink()
        self._cached: OrderedDict[int, int] = OrderedDict()
        """Bytes of the cached shards, the least recently used first."""
        self._pinned: Counter[int] = Counter()
        """Number of processes that have pinned a shard."""
        self._in_flight: dict[int, Signal] = {}
        self.peak_bytes = 0
        self.num_evicted = 0

    def read(self, read: Read) -> Process:
        """Waits until the bytes of a sample are there."""
        if read.shard in self._cached:
            self._cached.move_to_end(read.shard)
            return
        if read.is_owned and self._max_bytes is not None:
            yield from self.download(read.shard, read.window)
            if read.shard in self._cached:
                return
        self._traffic.sample_requests[read.window] += 1
        self._traffic.sample_bytes[read.window] += read.num_bytes
        yield self._store.answered_at(read.num_bytes, self._link)

    def download(self, shard: int, window: int, *, wait: bool = True) -> Process:
        """Downloads a shard unless it is cached; `wait` for another process that does so."""
        if shard in self._cached:
            return
        if shard in self._in_flight:
            if wait:
                yield self._in_flight[shard]
            return
        num_bytes = self._shard_bytes[shard]
        if not self._reserve(num_bytes):
            return
        published = self._in_flight[shard] = Signal()
        traffic = self._traffic
        for start in range(0, num_bytes, CHUNK_BYTES):
            length = min(CHUNK_BYTES, num_bytes - start)
            traffic.chunk_requests[window] += 1
            traffic.download_bytes[window] += length
            yield self._store.answered_at(length, self._link)
        traffic.downloads[window] += 1
        self._cached[shard] = num_bytes
        del self._in_flight[shard]
        self._clock.fire(published)

    def pin(self, shards: Sequence[int], instead_of: Sequence[int]) -> None:
        """Pins shards for a process, which has pinned others before."""
        self._pinned.update(shards)
        self._pinned.subtract(instead_of)

    def use(self, owned: OwnedShards) -> tuple[Sequence[int], Sequence[tuple[int, int]]]:
        """What a process pins, and what its prefetch thread downloads with their windows."""
        if self._max_bytes is None:
            return (), ()
        return (owned.both, owned.upcoming) if self._downloads_ahead else (owned.current, ())

    def _reserve(self, num_bytes: int) -> bool:
        assert self._max_bytes is not None
        in_flight = sum(self._shard_bytes[shard] for shard in self._in_flight)
        free = self._max_bytes - in_flight - num_bytes
        names = evicted(self._cached, lambda shard: self._pinned[shard] > 0, free)
        if names is None:
            return False
        for shard in names:
            del self._cached[shard]
        self.num_evicted += len(names)
        used = in_flight + num_bytes + sum(self._cached.values())
        self.peak_bytes = max(self.peak_bytes, used)
        return True


class SimulatedRun:
    """All processes of a run, for a number of micro-steps.

    Args:
        clock: Clock of the run.
        plan: Reads of the ranks.
        shape: Ranks and workers.
        nodes: One for each node.
        num_micro_steps: Where the run ends.
    """

    def __init__(
        self,
        clock: SimulatedClock,
        plan: ReadingPlan,
        shape: LoaderShape,
        nodes: Sequence[SimulatedNode],
        num_micro_steps: int,
    ) -> None:
        self._clock = clock
        self._plan = plan
        self._shape = shape
        self._nodes = nodes
        self._num_micro_steps = num_micro_steps
        self._ahead = PREFETCH_FACTOR * shape.workers
        # Workers read ahead of the ranks up to the end, too.
        num_asked = num_micro_steps + self._ahead
        self._asked = [Signal() for _ in range(num_asked)]
        """Fired when the batches of a micro-step may be read."""
        self._complete = [Signal() for _ in range(num_asked)]
        """Fired when every rank has its batch."""
        self._num_ready = [0] * num_asked
        self.ready_at = np.zeros((num_asked, shape.world_size))
        """Times at which the batches were ready."""
        self.ended_at = 0.0
        """Time of the end of the last micro-step."""
        self.needed_at = np.zeros(num_micro_steps)
        """Times at which the ranks needed them."""

    def run(self) -> None:
        """Runs to the end of the last micro-step, and of what was read in advance by then."""
        for rank in range(self._shape.world_size):
            for worker in range(max(self._shape.workers, 1)):
                self._clock.start(self._work(rank, worker))
        self._clock.start(self._train())
        self._clock.run()
        self.ready_at = self.ready_at[: self._num_micro_steps]

    def _train(self) -> Process:
        """All ranks together: each micro-step begins when the last rank has its batch."""
        ahead = self._ahead
        for step in range(ahead):
            self._clock.fire(self._asked[step])
        for step in range(self._num_micro_steps):
            self.needed_at[step] = self._clock.now
            if not ahead:
                self._clock.fire(self._asked[step])
            yield self._complete[step]
            # The loader asks for a further batch when it hands one over.
            if ahead:
                self._clock.fire(self._asked[step + ahead])
            yield self._clock.now + self._shape.micro_step_s
        self.ended_at = self._clock.now

    def _work(self, rank: int, worker: int) -> Process:
        """One loader worker: every `workers`-th batch of its rank."""
        shape = self._shape
        number = rank // shape.ranks_per_node
        node, thread = self._nodes[number], None
        pinned: Sequence[int] = ()
        requested: Sequence[tuple[int, int]] = ()
        decode_s = shape.decode_s * shape.micro_batch
        for step in range(worker, len(self._asked), max(shape.workers, 1)):
            yield self._asked[step]
            reads = self._plan.reads(step, rank)
            pins, upcoming = node.use(self._plan.owned_shards(step, number))
            if pins != pinned:
                node.pin(pins, instead_of=pinned)
                pinned = pins
            if upcoming != requested:
                requested, before, thread = upcoming, thread, Signal()
                self._clock.start(self._prefetch(node, upcoming, before, thread))
            for read in reads:
                yield from node.read(read)
            if decode_s:
                yield self._clock.now + decode_s
            self.ready_at[step, rank] = self._clock.now
            self._num_ready[step] += 1
            if self._num_ready[step] == shape.world_size:
                self._clock.fire(self._complete[step])

    def _prefetch(
        self,
        node: SimulatedNode,
        shards: Sequence[tuple[int, int]],
        before: Signal | None,
        ended: Signal,
    ) -> Process:
        """A prefetch thread: downloads shards one by one, after the thread `before`."""
        if before is not None:
            yield before
        for shard, window in shards:
            yield from node.download(shard, window, wait=False)
        self._clock.fire(ended)
