"""The arguments of `tvr simulate`."""

from __future__ import annotations

from typing import Annotated

import tyro
from pydantic.dataclasses import dataclass

from tvr.data_prep.cli_errors import STRICT


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class SimulateArguments:
    """Predicts what training asks of an object store: requests, bytes, cache, waits, start-up.

    The real sample order, division among ranks and cache rules run on a fake store and a fake
    clock. The data set is one that exists, or is described by --clips and --clip-kb."""

    url: Annotated[str | None, tyro.conf.Positional] = None
    """Folder or fsspec URL of a packed data set; only its index is read."""
    clips: int | None = None
    """Without a URL: number of clips."""
    clip_kb: float | None = None
    """Without a URL: kilobytes (1,000 bytes) of a clip in its shard."""
    samples_per_shard: int = 1000
    """Without a URL: clips per shard."""
    ranks: int
    """GPUs of the run."""
    ranks_per_node: int = 8
    """GPUs of a node; the last node may have fewer."""
    micro_batch: int
    """Pairs per GPU and forward pass (train.micro_batch)."""
    global_batch: int | None = None
    """Pairs per step (train.global_batch); default: micro_batch x ranks."""
    workers: int = 4
    """Loader workers per GPU (data.workers)."""
    shard_cache_gib: int = 100
    """Size of a node's shard cache (data.shard_cache_gib); 0 = none, every clip is one request."""
    step_s: float
    """Seconds that a step computes when no rank waits for data."""
    decode_ms: float = 0.0
    """Milliseconds that a worker needs for a clip, from bytes to tensor."""
    latency_ms: float = 30.0
    """Milliseconds from a request to the first byte of the answer."""
    node_gb_s: float = 3.0
    """Gigabytes a second between a node and the store."""
    store_gb_s: float | None = None
    """Gigabytes a second of the store, for all nodes together; default: no limit."""
    request_mb_s: float | None = None
    """Megabytes a second of a single request; default: no limit."""
    seed: int = 0
    """Seed of the sample order (train.seed)."""
    start_step: int = 0
    """First step, with an empty cache."""
    windows: int | None = None
    """Windows of shards to simulate; the rest of the epoch is extrapolated. Default: enough for
    3 windows and 2 million clips, but no more than an epoch."""
    json: str | None = None
    """File for the whole prediction as JSON; - = standard output, instead of the table."""
