"""Time and peak memory of the similarity's backends and of the reference, forward and backward.

The peak counts what lies above the inputs and a first, tiny call, which loads the libraries.

Prints one line of JSON. Run by `make bench`, or by hand with other sizes: similarity.py --pairs 512
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from typing import Any

IMPLEMENTATIONS = ("reference", "torch", "compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=512, help="texts, and videos")
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(**vars(options))))
        return
    # Each in a process of its own: the peak of one must not hide that of the other.
    found = {name: json.loads(run_alone(name)) for name in IMPLEMENTATIONS}
    naive = found["reference"]
    sizes = {key: value for key, value in vars(options).items() if key != "only"}
    line = {
        "benchmark": "similarity, att_wti, neighbour frames, float32, forward + backward",
        "sizes": sizes,
        **found,
        "ratios_to_reference": {
            name: {key: round(found[name][key] / naive[key], 3) for key in ("median_s", "peak_mb")}
            for name in IMPLEMENTATIONS[1:]
        },
        "machine": machine(),
    }
    print(json.dumps(line))


def run_alone(name: str) -> str:
    line = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(
    *, pairs: int, words: int, frames: int, width: int, repeats: int, only: str
) -> dict[str, Any]:
    """Seconds of each repeat after one warm-up, and the growth of the process's peak memory."""
    import torch
    from torch.nn.functional import normalize

    if only == "reference":
        similarity = import_module("tvr.kernels.reference").dmae_similarity
    else:
        similarity = partial(import_module("tvr.kernels.similarity").dmae_similarity, backend=only)
    torch.manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return normalize(torch.randn(*shape, width), dim=-1).requires_grad_()

    sentence, tokens, images = unit(pairs), unit(pairs, words), unit(pairs, frames)
    word_mask = (torch.arange(words) < torch.randint(4, words + 1, (pairs, 1))).long()
    frame_mask = torch.ones(pairs, frames, dtype=torch.long)
    word_logits = torch.randn(pairs, words, requires_grad=True)
    frame_logits = torch.randn(pairs, frames, requires_grad=True)

    def once(n: int) -> float:
        started = time.perf_counter()
        scores = similarity(
            *(x[:n] for x in (sentence, tokens, images, word_mask, frame_mask)),
            word_logits=word_logits[:n],
            frame_logits=frame_logits[:n],
        )
        scores.square().sum().backward()
        return time.perf_counter() - started

    once(2)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = [once(pairs) for _ in range(repeats + 1)]
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    return {
        "median_s": round(statistics.median(seconds[1:]), 4),
        "spread_s": [round(min(seconds[1:]), 4), round(max(seconds[1:]), 4)],
        "peak_mb": round(peak_kb / 1024, 1),
    }


def machine() -> dict[str, Any]:
    import torch

    return {
        "cpu": platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
