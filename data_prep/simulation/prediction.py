"""The parts of a prediction; each is a group of its JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """What was simulated."""

    windows: int
    """Complete windows; all others of the epoch are extrapolated from them."""
    windows_per_epoch: int
    shards_per_window: int
    samples: int
    """Of these windows."""
    samples_per_epoch: int
    micro_steps: int
    """All that were simulated."""
    simulated_s: float
    """Time on the fake clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLoad:
    """What one epoch asks of the store, with caches that are empty at its start."""

    requests: float
    shard_downloads: float
    """Whole shards, over all nodes."""
    sample_requests: float
    """Samples read by one range request each, because another node owns their shard."""
    num_bytes: float
    over_data_set: float
    """Bytes over the size of the data set."""
    requests_per_s: float
    gb_per_s: float
    peak_requests_per_s: int
    """Of the busiest second."""
    peak_gb_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """How long the ranks wait for data after the first window, per micro-step."""

    epoch_s: float
    """Seconds of an epoch with all waits."""
    lost_share: float
    """Part of this time in which the last rank waits, so that all do."""
    mean_s: float
    """Of the last rank of a micro-step."""
    p95_s: float
    longest_s: float
    mean_rank_s: float
    """Of all ranks, before they wait for each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartUp:
    """From the start of the processes to the first batch."""

    index_bytes: int
    """From the store: `manifest.json` for each rank of a node, the file of rows once."""
    index_requests: int
    """Likewise."""
    download_s: float
    """Seconds that the index's bytes need."""
    open_s: float
    """Seconds to open the index and to hash its rows, on this machine."""
    measured_rows: int
    """Rows of the index that was opened for that; the rest is extrapolated."""
    order_s: float
    """Seconds to draw the order of the first batch, on this machine."""
    first_batch_s: float
    """Seconds from the start of the workers until the last rank has its batch."""

    @property
    def total_s(self) -> float:
        return self.download_s + self.open_s + self.order_s + self.first_batch_s


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeMemory:
    """Memory of the processes of a node for index and order, and the disk space of its cache."""

    index_bytes: int
    mapped_bytes: int
    """Of the index's rows, which all processes share; the system may drop pages that are not in
    use."""
    order_bytes: int
    cache_peak_bytes: int
    """Of the node with the largest."""
    evicted: int
    """Shards that nodes removed from their caches during the simulated time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The result of a simulation."""

    stretch: Stretch
    store: StoreLoad
    waiting: Waiting
    start_up: StartUp
    node: NodeMemory
