"""The command line of `tvr bench`.

Exit codes: 0 done; 2 bad usage; 3 a measurement failed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from tvr_bench.harness import MeasurementFailed

from tvr.data_prep.cli_errors import run_command
from tvr.launchers.exit_codes import EXIT_FAILED

BENCHMARKS = {
    "kernels": ("kernels:bench_kernels", "time and memory of the similarity and its loss"),
    "data": ("data:bench_data", "clips/s of the sources of training batches"),
    "train": ("train:bench_train", "the parts of a training step, and more ranks"),
    "save": ("train:bench_save", "how long a training step waits for a checkpoint"),
    "metrics": ("metrics:bench_metrics", "cost of metrics and scrapes in a training step"),
}
"""Each benchmark's `module:function` in this folder, and its help."""


def bench(argv: Sequence[str]) -> int:
    """`tvr bench`: runs one benchmark and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="tvr bench",
        usage=f"tvr bench {{{','.join(BENCHMARKS)}}} ...",
        epilog="`tvr bench kernels --help` and so on describe them.",
    )
    help_text = "; ".join(f"{name}: {text}" for name, (_, text) in BENCHMARKS.items())
    parser.add_argument("what", choices=BENCHMARKS, help=help_text)
    name = parser.parse_args(list(argv[:1])).what
    module, _, function = BENCHMARKS[name][0].partition(":")
    run = getattr(importlib.import_module(f"tvr_bench.{module}"), function)

    def guarded() -> int:
        try:
            return run(list(argv[1:]))
        except MeasurementFailed as failure:
            print(f"tvr bench {name}: {failure}", file=sys.stderr)
            return EXIT_FAILED

    return run_command(f"tvr bench {name}", guarded)
