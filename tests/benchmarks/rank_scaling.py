"""Time of one rank's similarity and loss at a fixed global batch, which should fall as 1 / W.

Each of W ranks has G / W texts and all G videos. The ranks run one after another in one process,
without communication: the work of W machines without their network. Forward + backward with NegNCE
in log mode. Efficiency is the time of one rank / (W x time of W ranks), ideally 1.

Prints one line of JSON: rank_scaling.py --pairs 1024 > tests/benchmarks/results/rank_scaling.json
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from typing import Any

from tvr_bench.harness import machine, versions
from tvr_bench.kernels_process import BACKWARD, Job, seconds

from tvr.launchers.host_limits import host_cpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1024, help="of the global batch")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--implementations", nargs="+", default=["compiled", "streamed", "torch"])
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=host_cpus().usable)
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("words", "frames", "width", "threads")}
    rows: list[dict[str, Any]] = []
    for implementation in options.implementations:
        alone = None
        for ranks in options.ranks:
            job = Job(
                implementation=implementation,
                texts=options.pairs // ranks,
                videos=options.pairs,
                loss=True,
                **sizes,
            )
            times = seconds(job, (BACKWARD,), repeats=options.repeats)[BACKWARD]
            alone = alone or ranks * median(times)
            row = {"implementation": implementation, "ranks": ranks, "median_s": median(times)}
            row |= {"fastest_s": min(times), "slowest_s": max(times)}
            rows.append(row | {"efficiency": alone / (ranks * median(times))})
    line = {
        "benchmark": "similarity and NegNCE (log) of one rank, att_wti, float32, full lengths",
        "sizes": {"pairs": options.pairs, **sizes},
        "repeats": options.repeats,
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
