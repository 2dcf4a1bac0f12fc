"""Time and memory of opening the index of ten million clips, and of a late step's first batches.

    .venv/bin/python tests/benchmarks/synthetic_index.py --json out.json

Writes an index without samples, opens it in a fresh process, and finds the samples of the first
batch of each of 4 workers of some of 64 ranks from step 1,000,000 on: each worker draws the order
of its window, divides its micro-step between the ranks, and looks up the rows of its own. Memory is
that of the process, without the page cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parent.parent
RANKS, WORKERS, BATCH, FIRST_STEP = 64, 4, 32, 1_000_000


def main() -> None:
    """Measures, prints the numbers, and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, default=4, help="of 64, whose rows are looked up")
    parser.add_argument("--json")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(opened(arguments.open, arguments.ranks)))
        return
    with tempfile.TemporaryDirectory() as folder:
        versions = {"python": platform.python_version(), "numpy": np.__version__}
        result: dict[str, Any] = {"benchmark": "synthetic index", "versions": versions}
        result["rows"] = arguments.rows
        result |= written(folder, arguments.rows)
        command = [sys.executable, __file__, "--open", folder, "--ranks", str(arguments.ranks)]
        for repeat in ("first", "second"):  # the second finds the file in the page cache
            ended = subprocess.run(command, capture_output=True, text=True, check=True)
            result[repeat] = json.loads(ended.stdout)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")


def written(folder: str, num_rows: int) -> dict[str, Any]:
    """Writes the index; returns its sizes, and the memory that writing it took."""
    sys.path.insert(0, str(TESTS))
    from builders.synthetic_rows import write_synthetic

    start = time.perf_counter()
    before = anonymous_mb()
    write_synthetic(folder, num_rows)
    return {
        "write_s": round(time.perf_counter() - start, 1),
        "write_mb": round(anonymous_mb() - before, 1),
        "rows_mb": round((Path(folder) / "samples.rows").stat().st_size / 1e6, 1),
        "manifest_json_mb": round((Path(folder) / "manifest.json").stat().st_size / 1e6, 2),
    }


def alone(rank: int) -> range:
    """A node with one rank."""
    return range(rank, rank + 1)


def opened(folder: str, num_ranks: int) -> dict[str, Any]:
    """Opens the index and looks rows up; returns seconds and memory."""
    from tvr.data_prep.dataset.manifest import read_manifest
    from tvr.data_prep.reading.locality import RankShare
    from tvr.data_prep.reading.order import SampleOrder, window_shards

    before = anonymous_mb()
    start = time.perf_counter()
    manifest = read_manifest(folder)
    open_s, after = time.perf_counter() - start, anonymous_mb()
    samples, sizes, times = manifest.samples, manifest.shard_sizes, []
    for rank in (RANKS - 1) * np.arange(num_ranks) // max(1, num_ranks - 1):
        share = RankShare(
            rank=int(rank), world_size=RANKS, micro_batch=BATCH, node=alone(int(rank))
        )
        start = time.perf_counter()
        for worker in range(WORKERS):
            # A worker is a process of its own, so it draws its window itself.
            order = SampleOrder(sizes, 0, window_shards(RANKS * BATCH, len(sizes)))
            for position, location in share.samples(order, FIRST_STEP + worker):
                row = location.sample
                assert position // (RANKS * BATCH) == FIRST_STEP + worker
                assert samples.shard[row] == location.shard
                assert min(samples.offset[row], samples.length[row], samples.crc32[row]) >= 0
                assert samples.key[row]
        times.append(time.perf_counter() - start)
    return {
        "open_s": round(open_s, 3),
        "open_mb": round(after - before, 1),
        "first_batches_of_the_workers_of_a_rank_s": [round(value, 4) for value in times],
        "process_mb_after_rows": round(anonymous_mb() - before, 1),
    }


def anonymous_mb() -> float:
    """Memory of this process that no file backs, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return kib * 1024 / 1e6


if __name__ == "__main__":
    main()
