"""Predicts what training asks of an object store, by a simulation of some windows of an epoch.

The sample order, its division among ranks and nodes, and the rules of the shard cache are those of
`reading`. The store, the network, the disks and the clock are not: a request takes the latency and
its share of the bandwidth, and a local read takes no time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tvr.data_prep.dataset.manifest import Shard
from tvr.data_prep.reading.locality import PREFETCH_FACTOR, RankShare, training_need
from tvr.data_prep.reading.node_cache import CacheFolder
from tvr.data_prep.reading.order import OrderWindow, SampleOrder, window_shards
from tvr.data_prep.simulation.clock import SimulatedClock
from tvr.data_prep.simulation.fake_store import FakeStore, Network
from tvr.data_prep.simulation.nodes import LoaderShape, SimulatedNode, SimulatedRun, Traffic
from tvr.data_prep.simulation.prediction import (
    NodeMemory,
    Prediction,
    StartUp,
    StoreLoad,
    Stretch,
    Waiting,
)
from tvr.data_prep.simulation.reading_plan import ReadingPlan
from tvr.data_prep.simulation.start_up import IndexCost, MeasuredCall, measure

# Simulated by default: enough windows to leave the cold start behind, and for a mean.
MIN_WINDOWS = 3
MIN_SAMPLES = 2_000_000
# Each rank reads the index when it checks its settings and when it builds its loader.
INDEX_READINGS = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DataShape:
    """Sizes of a data set."""

    shards: Sequence[Shard]
    sample_bytes: Callable[[np.ndarray], np.ndarray]
    """Gives the bytes of the samples in these manifest rows."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.shard_bytes for shard in self.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunShape:
    """Settings of a training run that decide what it reads."""

    loader: LoaderShape
    global_batch: int
    seed: int
    start_step: int
    """First step; all caches are empty."""
    cache_bytes: int | None
    """Limit of a node's cache; None = no cache, so that every sample is one request."""


def simulate(
    data: DataShape,
    run: RunShape,
    network: Network,
    index: IndexCost,
    *,
    windows: int | None = None,
) -> Prediction:
    """Simulates a run from its start to the end of some windows, and extrapolates to an epoch.

    Args:
        data: Sizes of the data set.
        run: Settings of the run.
        network: Speed of the store.
        index: Cost of the data set's index.
        windows: Complete windows to simulate, at most an epoch's; None = at least MIN_WINDOWS and
            MIN_SAMPLES.

    Raises:
        ValueError: a number is out of range, or the batches do not fit the ranks.
    """
    _check(run, network, windows)
    shape = run.loader
    per_window = window_shards(run.global_batch, len(data.shards))
    sizes = [shard.num_samples for shard in data.shards]
    first_position = run.start_step * run.global_batch
    pairs = shape.world_size * shape.micro_batch

    def first_draw() -> SampleOrder:
        order = SampleOrder(sizes, run.seed, per_window)
        order.locate_range(first_position, first_position + pairs)
        return order

    def two_windows() -> SampleOrder:
        order = first_draw()
        # A worker holds the next window as well, when a batch lies in both.
        order.locate(order.window_at(first_position).end)
        return order

    _, order_cost = measure(first_draw)
    order, held = measure(two_windows)
    order_cost = replace(order_cost, held_bytes=held.held_bytes)
    counted, end = _stretch(order, first_position, windows)
    num_micro_steps = -(-(end - first_position) // pairs)
    clock = SimulatedClock()
    store = FakeStore(clock, network)
    traffic = Traffic()
    plan = ReadingPlan(
        order,
        data.sample_bytes,
        first_position=first_position,
        num_micro_steps=num_micro_steps + PREFETCH_FACTOR * shape.workers,
        world_size=shape.world_size,
        ranks_per_node=shape.ranks_per_node,
        micro_batch=shape.micro_batch,
    )
    shard_bytes = [shard.shard_bytes for shard in data.shards]
    nodes = [
        SimulatedNode(clock, store, traffic, shard_bytes, run.cache_bytes, ahead)
        for ahead in _downloads_ahead(data, run, order, plan.node_ranks)
    ]
    simulated = SimulatedRun(clock, plan, shape, nodes, num_micro_steps)
    simulated.run()
    samples = sum(window.num_samples for window in counted)
    stretch = Stretch(
        windows=len(counted),
        windows_per_epoch=order.num_windows,
        shards_per_window=len(counted[0].shards),
        samples=samples,
        samples_per_epoch=order.num_samples,
        micro_steps=num_micro_steps,
        simulated_s=simulated.ended_at,
    )
    steady = (counted[1].first if len(counted) > 1 else counted[0].first) - first_position
    waiting = _waiting(simulated, shape, -(-steady // pairs), order.num_samples / pairs)
    numbers = [plan.number(window) for window in counted]
    start_up = _start_up(simulated, shape, network, index, order_cost)
    return Prediction(
        stretch=stretch,
        store=_load(traffic, store, numbers, stretch, waiting, start_up, data.num_bytes),
        waiting=waiting,
        start_up=start_up,
        node=_memory(nodes, shape, index, order_cost),
    )


def _check(run: RunShape, network: Network, windows: int | None) -> None:
    shape = run.loader
    least = {
        "ranks": (shape.world_size, 1),
        "ranks_per_node": (shape.ranks_per_node, 1),
        "micro_batch": (shape.micro_batch, 1),
        "workers": (shape.workers, 0),
        "start_step": (run.start_step, 0),
        "windows": (1 if windows is None else windows, 1),
        "step_s": (shape.micro_step_s, 0),
        "decode_ms": (shape.decode_s, 0),
        "latency_ms": (network.latency_s, 0),
    }
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise ValueError(f"{name}={value} must be at least {smallest}")
    pairs = shape.world_size * shape.micro_batch
    if run.global_batch < pairs or run.global_batch % pairs:
        nearest = max(1, round(run.global_batch / pairs)) * pairs
        raise ValueError(
            f"global_batch={run.global_batch} must be a multiple of micro_batch x ranks ="
            f" {shape.micro_batch} x {shape.world_size}; the nearest is {nearest}"
        )


def _downloads_ahead(
    data: DataShape, run: RunShape, order: SampleOrder, nodes: Sequence[range]
) -> list[bool]:
    """Whether the cache of each node has room for shards that are read next.

    Raises:
        ValueError: a cache has none for the shards that are read at once, see `CacheFolder.check`.
    """
    if run.cache_bytes is None:
        return [False] * len(nodes)
    shape = run.loader
    folder = CacheFolder(path="of a node", max_bytes=run.cache_bytes)
    shares = [
        RankShare(
            rank=node.start,
            world_size=shape.world_size,
            micro_batch=shape.micro_batch,
            node=node,
        )
        for node in nodes
    ]
    return [
        folder.check(training_need(data.shards, order, share, shape.workers)) for share in shares
    ]


def _stretch(
    order: SampleOrder, first_position: int, windows: int | None
) -> tuple[list[OrderWindow], int]:
    """The complete windows from a position on, and the position after the last of them."""
    counted: list[OrderWindow] = []
    window = order.window_at(first_position)
    if window.first < first_position:
        window = order.next_window(window)  # its beginning is not read
    samples = 0
    while len(counted) < order.num_windows and (
        len(counted) < (windows or MIN_WINDOWS) or (windows is None and samples < MIN_SAMPLES)
    ):
        counted.append(window)
        samples += window.num_samples
        window = order.next_window(window)
    return counted, counted[-1].end


def _waiting(
    simulated: SimulatedRun, shape: LoaderShape, steady: int, micro_steps_per_epoch: float
) -> Waiting:
    """Waits from micro-step `steady` on, or after the first one if there are no others."""
    waits = np.maximum(simulated.ready_at - simulated.needed_at[:, None], 0)
    waits = waits[steady:] if steady < len(waits) else waits[1:]
    if not len(waits):
        waits = np.zeros((1, shape.world_size))
    last = waits.max(axis=1)
    mean = float(last.mean())
    step_s = shape.micro_step_s + mean
    return Waiting(
        epoch_s=micro_steps_per_epoch * step_s,
        lost_share=mean / step_s if step_s else 0.0,
        mean_s=mean,
        p95_s=float(np.quantile(last, 0.95)),
        longest_s=float(last.max()),
        mean_rank_s=float(waits.mean()),
    )


def _load(
    traffic: Traffic,
    store: FakeStore,
    windows: Sequence[int],
    stretch: Stretch,
    waiting: Waiting,
    start_up: StartUp,
    data_set_bytes: int,
) -> StoreLoad:
    """The traffic of these windows, extrapolated to an epoch."""
    factor = stretch.samples_per_epoch / stretch.samples

    def per_epoch(*counts: Counter[int]) -> float:
        return factor * sum(count[window] for count in counts for window in windows)

    requests = per_epoch(traffic.chunk_requests, traffic.sample_requests)
    num_bytes = per_epoch(traffic.download_bytes, traffic.sample_bytes)
    # A step that computes nothing and waits for nothing takes no time.
    epoch_s = waiting.epoch_s or float("inf")
    return StoreLoad(
        requests=requests,
        shard_downloads=per_epoch(traffic.downloads),
        sample_requests=per_epoch(traffic.sample_requests),
        num_bytes=num_bytes,
        over_data_set=num_bytes / data_set_bytes,
        requests_per_s=requests / epoch_s,
        gb_per_s=num_bytes / epoch_s / 1e9,
        peak_requests_per_s=max(store.requests_by_second.values(), default=0),
        peak_gb_per_s=max(store.bytes_by_second.values(), default=0) / 1e9,
    )


def _start_up(
    simulated: SimulatedRun,
    shape: LoaderShape,
    network: Network,
    index: IndexCost,
    order: MeasuredCall,
) -> StartUp:
    readings = INDEX_READINGS * min(shape.ranks_per_node, shape.world_size)
    index_bytes = readings * index.manifest_bytes + index.rows_bytes
    bandwidth = network.node_bytes_per_s
    if network.store_bytes_per_s is not None:
        bandwidth = min(bandwidth, network.store_bytes_per_s / shape.num_nodes)
    # The requests of one process follow each other.
    in_turn = INDEX_READINGS * index.manifest_bytes + index.rows_bytes
    download_s = index_bytes / bandwidth
    if network.request_bytes_per_s is not None:
        download_s = max(download_s, in_turn / network.request_bytes_per_s)
    waits = INDEX_READINGS * index.manifest_requests + index.rows_requests
    return StartUp(
        index_bytes=index_bytes,
        index_requests=readings * index.manifest_requests + index.rows_requests,
        download_s=download_s + waits * network.latency_s,
        open_s=INDEX_READINGS * index.open_s + index.verify_s,
        measured_rows=index.measured_rows,
        order_s=order.seconds,
        first_batch_s=float(simulated.ready_at[0].max()),
    )


def _memory(
    nodes: Sequence[SimulatedNode], shape: LoaderShape, index: IndexCost, order: MeasuredCall
) -> NodeMemory:
    ranks = min(shape.ranks_per_node, shape.world_size)
    return NodeMemory(
        # Workers are forked and share this memory with their rank.
        index_bytes=ranks * index.memory_bytes,
        mapped_bytes=index.rows_bytes,
        order_bytes=ranks * max(shape.workers, 1) * order.held_bytes,
        cache_peak_bytes=max(node.peak_bytes for node in nodes),
        evicted=sum(node.num_evicted for node in nodes),
    )
