"""The command `tvr bench`, whose benchmarks are part of the source checkout, not of the wheel."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from tvr.launchers.exit_codes import EXIT_USAGE

BENCHMARKS = Path(__file__).resolve().parent.parent / "tests" / "benchmarks"


def bench(argv: Sequence[str]) -> int:
    """Runs a benchmark of the source checkout that this package lies in.

    Returns:
        The benchmark's exit code; 2 if this package is installed without its checkout.
    """
    if not (BENCHMARKS / "tvr_bench").is_dir():
        print(
            "tvr bench: the benchmarks are part of the source checkout, and this package is "
            "installed without it; clone the repository and run `make bench` or "
            "`.venv/bin/tvr bench` there",
            file=sys.stderr,
        )
        return EXIT_USAGE
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module("tvr_bench.cli").bench(argv)
