"""Cost of the matching `words_to_frames` relative to `two_way`: similarity and NegNCE.

Both run in turns in one process, forward + backward, on the same features. Times are processor
seconds of this process, so that other programs disturb the ratio little. Peaks of memory come from
processes of their own.

Prints one line of JSON. Other sizes: one_way.py --pairs 256 --words 77
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from tvr_bench.harness import machine, versions
from tvr_bench.kernels_process import BACKWARD, Job, peak_bytes
from tvr_bench.kernels_task import make_inputs, run

IMPLEMENTATIONS = ("reference", "compiled", "torch", "dense", "streamed")
MATCHINGS = ("two_way", "words_to_frames")


def measure(job: Job, repeats: int) -> dict[str, Any]:
    """Ratios of one implementation."""
    jobs = {matching: replace(job, matching=matching) for matching in MATCHINGS}
    inputs = make_inputs(job)
    seconds: dict[str, list[float]] = {matching: [] for matching in MATCHINGS}
    for repeat in range(repeats + 1):
        for matching, one in jobs.items():
            started = time.process_time()
            run(one, inputs, backward=True)
            if repeat:  # the first fills heap and caches
                seconds[matching].append(time.process_time() - started)
    peaks = {matching: peak_bytes(one, (BACKWARD,))[BACKWARD] for matching, one in jobs.items()}
    both, one_way = (statistics.median(seconds[matching]) for matching in MATCHINGS)
    return {
        "seconds": seconds,
        "time_ratio": one_way / both,
        "peak_bytes": peaks,
        "memory_ratio": peaks["words_to_frames"] / peaks["two_way"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("pairs", 256), ("words", 32), ("frames", 12), ("width", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    job = Job(
        implementation="",
        texts=given.pairs,
        videos=given.pairs,
        words=given.words,
        frames=given.frames,
        width=given.width,
        lengths="ragged",
        loss=True,
        threads=given.threads,
    )
    found = {
        name: measure(replace(job, implementation=name), given.repeats) for name in IMPLEMENTATIONS
    }
    result = {"benchmark": "one_way", **vars(given), "versions": versions(), "machine": machine()}
    print(json.dumps(result | {"implementations": found}))


if __name__ == "__main__":
    main()
