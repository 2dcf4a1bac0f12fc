"""Predictions of `tvr simulate` against real loaders that read from a slow store on this machine.

One to four nodes, each with its own cache folder, read windows of small shards over HTTP, with a
latency and a bandwidth that the server keeps. Requests, bytes and caches are counted. Times are
measured, too: the real ones contain the work of this machine, which the prediction leaves out.

Then the predictions for 10 million clips of 1 MB. Prints one line of JSON:
PYTHONPATH=tests simulation.py > tests/benchmarks/results/simulation.json
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from builders.store_traffic import SEED, NodesRun, measure_nodes, write_clips_of_many_sizes
from tvr_bench.harness import machine, versions

from tvr.data_prep.simulation.arguments import SimulateArguments
from tvr.data_prep.simulation.inputs import data_of, network_of, run_of
from tvr.data_prep.simulation.simulate import simulate

SHARDS, PER_SHARD = 64, 12
LATENCY_MS, NODE_MB_S, STEP_S = 20.0, 0.5, 0.1
MUCH = 1 << 30
RUNS = [
    NodesRun(ranks=2, ranks_per_node=2, micro_batch=8, workers=1, cache_bytes=MUCH, windows=2),
    NodesRun(ranks=4, ranks_per_node=2, micro_batch=4, workers=1, cache_bytes=MUCH, windows=2),
    NodesRun(ranks=3, ranks_per_node=1, micro_batch=8, workers=1, cache_bytes=MUCH, windows=2),
    NodesRun(ranks=4, ranks_per_node=1, micro_batch=4, workers=2, cache_bytes=MUCH, windows=2),
    NodesRun(ranks=4, ranks_per_node=2, micro_batch=4, workers=1, cache_bytes=None, windows=2),
]
# 8 GPUs a node, 4 workers a GPU, 3 GB/s a node, 30 ms, 1 s a step.
LARGE = [
    SimulateArguments(
        clips=10_000_000, clip_kb=1000.0, ranks=ranks, micro_batch=micro_batch, step_s=1.0
    )
    for ranks, micro_batch in ((64, 128), (1000, 128))
]


def small(folder: Path, scratch: Path, run: NodesRun) -> dict[str, Any]:
    """Counts and times of one run, predicted and measured."""
    arguments = SimulateArguments(
        url=str(folder),
        ranks=run.ranks,
        ranks_per_node=run.ranks_per_node,
        micro_batch=run.micro_batch,
        workers=run.workers,
        shard_cache_gib=0 if run.cache_bytes is None else run.cache_bytes >> 30,
        seed=SEED,
        step_s=STEP_S,
        latency_ms=LATENCY_MS,
        node_gb_s=NODE_MB_S / 1e3,
        windows=run.windows,
    )
    data, index = data_of(arguments)
    prediction = simulate(
        data, run_of(arguments), network_of(arguments), index, windows=run.windows
    )
    run = replace(
        run,
        step_s=STEP_S,
        latency_s=LATENCY_MS / 1e3,
        node_bytes_per_s=NODE_MB_S * 1e6,
        at_once=True,
    )
    measured = measure_nodes(folder, scratch, run)
    stretch, store = prediction.stretch, prediction.store
    share = stretch.samples / stretch.samples_per_epoch
    return {
        "run": asdict(run) | {"nodes": -(-run.ranks // run.ranks_per_node)},
        "predicted": {
            "requests": round(store.requests * share),
            "num_bytes": round(store.num_bytes * share),
            "downloads": round(store.shard_downloads * share),
            "cache_peak_bytes": prediction.node.cache_peak_bytes,
            "first_batch_s": prediction.start_up.first_batch_s,
            "waited_s": max(
                stretch.simulated_s
                - prediction.start_up.first_batch_s
                - stretch.micro_steps * STEP_S,
                0.0,
            ),
        },
        "measured": asdict(measured),
    }


def large(arguments: SimulateArguments) -> dict[str, Any]:
    """The prediction for a described data set, and the time that it took."""
    began = time.process_time()
    data, index = data_of(arguments)
    prediction = simulate(data, run_of(arguments), network_of(arguments), index)
    return {
        "inputs": asdict(arguments),
        **asdict(prediction),
        "cpu_s": time.process_time() - began,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "data"
        write_clips_of_many_sizes(folder, SHARDS, PER_SHARD)
        rows = [small(folder, Path(root) / f"run{n}", run) for n, run in enumerate(RUNS)]
    line = {
        "benchmark": "tvr simulate against real loaders, and for 10 million clips",
        "sizes": {"shards": SHARDS, "clips_per_shard": PER_SHARD},
        "store": {"latency_ms": LATENCY_MS, "node_mb_s": NODE_MB_S, "pause_s": STEP_S},
        "rows": rows,
        "large": [large(arguments) for arguments in LARGE],
        # Processes that wanted a core in the last 15 minutes; others slow the loaders.
        "load": os.getloadavg()[2],
        "versions": versions(),
        "machine": machine(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
