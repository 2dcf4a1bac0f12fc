"""A prediction as text."""

from __future__ import annotations

from collections.abc import Iterator

from tvr.data_prep.simulation.prediction import Prediction
from tvr.data_prep.simulation.simulate import DataShape, RunShape

Row = tuple[str, str]


def prediction_table(data: DataShape, run: RunShape, prediction: Prediction) -> str:
    """Returns the text that `tvr simulate` prints: what was simulated, then what it costs."""
    rows = list(_rows(data, run, prediction))
    width = max(len(name) for name, value in rows if value)
    lines = [f"  {name:<{width}}  {value}" if value else f"\n{name}" for name, value in rows]
    return "\n".join(lines).strip("\n")


def _rows(data: DataShape, run: RunShape, prediction: Prediction) -> Iterator[Row]:
    shape, stretch, store = run.loader, prediction.stretch, prediction.store
    waiting, start, node = prediction.waiting, prediction.start_up, prediction.node
    cache = (
        "no shard cache" if run.cache_bytes is None else f"cache {_size(run.cache_bytes)} a node"
    )
    yield "inputs", ""
    yield (
        "data set",
        f"{stretch.samples_per_epoch:,} clips in {len(data.shards):,} shards,"
        f" {_size(data.num_bytes)}",
    )
    yield (
        "run",
        f"{shape.world_size:,} ranks on {shape.num_nodes:,} nodes, {shape.workers} workers a rank,"
        f" micro-batch {shape.micro_batch}, global batch {run.global_batch:,}, {cache}",
    )
    whole = stretch.windows == stretch.windows_per_epoch
    yield (
        "simulated",
        f"{stretch.windows} of {stretch.windows_per_epoch} windows of {stretch.shards_per_window}"
        f" shards from step {run.start_step:,}: {stretch.samples:,} clips,"
        f" {stretch.micro_steps:,} micro-steps, {stretch.simulated_s:,.1f} s",
    )
    yield (
        "extrapolated",
        "nothing" if whole else "the rest of the epoch, by its clips; index below",
    )
    yield "store, first epoch with empty caches", ""
    yield (
        "requests",
        f"{store.requests:,.0f}: {store.shard_downloads:,.0f} shards in pieces,"
        f" {store.sample_requests:,.0f} clips one by one",
    )
    yield "bytes", f"{_size(store.num_bytes)}, {store.over_data_set:.3f} of the data set"
    yield (
        "rate",
        f"{store.requests_per_s:,.1f} requests/s, {store.gb_per_s:,.3f} GB/s on average;"
        f" busiest second {store.peak_requests_per_s:,} and {store.peak_gb_per_s:,.3f} GB",
    )
    yield "ranks", ""
    yield "epoch", f"{waiting.epoch_s:,.1f} s, of which {100 * waiting.lost_share:.1f} % waiting"
    yield (
        "wait a micro-step",
        f"mean {waiting.mean_s:.3f} s, 95th percentile {waiting.p95_s:.3f} s,"
        f" longest {waiting.longest_s:.3f} s; mean of all ranks {waiting.mean_rank_s:.3f} s",
    )
    yield "start-up", ""
    yield (
        "index",
        f"{_size(start.index_bytes)} in {start.index_requests:,} requests a node,"
        f" {start.download_s:.1f} s; opened in {start.open_s:.1f} s",
    )
    yield (
        "first batch",
        f"order {start.order_s:.1f} s, and again in each worker for each window;"
        f" bytes {start.first_batch_s:.1f} s",
    )
    yield (
        "together",
        f"{start.total_s:.1f} s (opening and order as on this machine; opening measured with"
        f" {start.measured_rows:,} rows)",
    )
    yield "a node", ""
    yield (
        "cache",
        f"peak {_size(node.cache_peak_bytes)}; {node.evicted:,} shards evicted on all nodes",
    )
    yield (
        "memory",
        f"index {_size(node.index_bytes)} and {_size(node.mapped_bytes)} mapped,"
        f" windows of the order {_size(node.order_bytes)}",
    )


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.3g} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB" if num_bytes < 1000 else f"{num_bytes:,.0f} TB"
