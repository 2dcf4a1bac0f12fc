"""Time and memory of opening the index of ten million clips, and of the first rows of a late step.

    .venv/bin/python tests/benchmarks/synthetic_index.py --json out.json

Writes an index without samples, opens it in a fresh process, and looks up the rows of the first
batch of each of 4 workers of some of 64 ranks at step 1,000,000. The rows are those of a window of
shards, in a shuffled order, as training reads them. Memory is that of the process, without the page
cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parent.parent
WORKERS, BATCH = 4, 64


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
        result = {"benchmark": "synthetic index", "rows": arguments.rows}
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


def opened(folder: str, num_ranks: int) -> dict[str, Any]:
    """Opens the index and looks rows up; returns seconds and memory."""
    from tvr.data_prep.dataset.manifest import read_manifest

    before = anonymous_mb()
    start = time.perf_counter()
    manifest = read_manifest(folder)
    open_s, after = time.perf_counter() - start, anonymous_mb()
    samples, sizes = manifest.samples, manifest.row_starts
    draws = np.random.default_rng(0)
    times = []
    for _ in range(num_ranks):
        start = time.perf_counter()
        for _ in range(WORKERS):
            shards = draws.choice(len(manifest.shards), 16, replace=False)
            rows = sizes[draws.choice(shards, BATCH)] + draws.integers(0, 1000, BATCH)
            for row in np.minimum(rows, len(samples) - 1).tolist():
                ranges = (samples.shard[row], samples.offset[row], samples.length[row])
                assert min(*ranges, samples.crc32[row]) >= 0
                assert samples.key[row]
        times.append(time.perf_counter() - start)
    return {
        "open_s": round(open_s, 3),
        "open_mb": round(after - before, 1),
        "first_rows_of_a_rank_s": [round(value, 4) for value in times],
        "process_mb_after_rows": round(anonymous_mb() - before, 1),
    }


def anonymous_mb() -> float:
    """Memory of this process that no file backs, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return kib * 1024 / 1e6


if __name__ == "__main__":
    main()
