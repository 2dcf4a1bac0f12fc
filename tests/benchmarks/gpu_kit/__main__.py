"""The GPU kit: everything that can be claimed of a GPU, measured by one command in 8 minutes.

    python tests/benchmarks/gpu_kit              # one CUDA device; `make gpu` runs the same
    python tests/benchmarks/gpu_kit --shrunk     # small shapes on the CPU, to see that it works

It needs no network, no make and no virtual environment. A part that needs a missing package is
reported as "not run: no module X", and the others run. Each part is a process of its own with a
budget of time; what would pass it is cut, and named. Nothing changes the settings of the card.

Exit codes: 0 all parts ran or said why not; 2 bad usage; 3 a part, a test or a comparison failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parents[1]
RESULTS = BENCHMARKS / "results"
PACKAGES = ("data_prep", "kernels", "launchers", "trainer")
sys.path.insert(0, str(BENCHMARKS))

from gpu_kit.machine import describe_machine, file_name  # noqa: E402
from gpu_kit.parts import PARTS, SHRUNK_BUDGET_FACTOR, TOTAL_BUDGET_S, run_part  # noqa: E402
from gpu_kit.report import failures, report  # noqa: E402


def main(argv: list[str]) -> int:
    """Runs the parts, prints the table and writes the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_kit", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shrunk", action="store_true", help="small shapes, on the CPU")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="file for all numbers; default: tests/benchmarks/results/gpu_CARD.json, and none with "
        "--shrunk",
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all"
    )
    parser.add_argument(
        "--budget-s",
        type=float,
        default=TOTAL_BUDGET_S,
        help=f"seconds for all parts together; {SHRUNK_BUDGET_FACTOR} times as many with --shrunk",
    )
    arguments = parser.parse_args(argv)
    factor = SHRUNK_BUDGET_FACTOR if arguments.shrunk else 1
    # Ended by a signal, the kit ends its parts too, which are in sessions of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tvr-gpu-kit-") as scratch:
        environment = child_environment(Path(scratch), on_cpu=arguments.shrunk)
        machine = describe_machine(environment)
        if not arguments.shrunk and machine["card"] is None:
            print(
                "gpu_kit: torch finds no CUDA device here; --shrunk runs small shapes on the CPU",
                file=sys.stderr,
            )
            return 2
        results = {}
        for name in arguments.parts:
            left = factor * arguments.budget_s - (time.monotonic() - started)
            budget = min(factor * PARTS[name].budget_s, left)
            results[name] = run_part(
                name,
                PARTS[name],
                {"device": "cpu" if arguments.shrunk else "cuda", "shrunk": arguments.shrunk},
                budget_s=budget,
                scratch=Path(scratch),
                environment=environment,
            )
    document = {
        "machine": machine,
        "shrunk": arguments.shrunk,
        "seconds": round(time.monotonic() - started, 1),
        "parts": results,
    }
    path = arguments.json
    if path is None and not arguments.shrunk:
        path = RESULTS / file_name(machine["card"]["name"])
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n")
    print(report(document, path), flush=True)
    return 3 if failures(document) else 0


def child_environment(scratch: Path, *, on_cpu: bool) -> dict[str, str]:
    """An environment in which `tvr`, the tests' set-ups and the benchmarks can be imported.

    `tvr` is a folder of links, so that nothing need be installed.
    """
    packages = scratch / "packages" / "tvr"
    packages.mkdir(parents=True)
    for name in PACKAGES:
        (packages / name).symlink_to(ROOT / name)
    paths = [str(packages.parent), str(BENCHMARKS), str(BENCHMARKS.parent)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if on_cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    # A launcher's variables would make the processes wait for other ranks.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return environment


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
