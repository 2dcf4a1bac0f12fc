"""The command line of `tvr bench metrics`. Exit codes as `tvr bench`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import tyro
from pydantic.dataclasses import dataclass
from rich.table import Table

from tvr.data_prep.cli_errors import STRICT
from tvr_bench.train import (
    bench_folder,
    bench_reported,
    of_any,
    run_on_ranks,
    say,
    with_data,
)
from tvr_bench.train_report import bench_table
from tvr_bench.rank_task import Task
from tvr.trainer.config import Positive, to_json

HOW = (
    "Rank 0's steps with and without metrics in turn, in one run; 25 of each while the endpoint is"
    " asked 50 times a second, then 25 of each while it is not, and so on. Medians. Of neighbours:"
    " the median of each step's ratio to the one beside it. Noise: half the distance of the"
    " quartiles over the median, of steps without metrics that nobody asks."
)
KINDS = {
    "off": "without metrics",
    "on": "with metrics",
    "off_scraped": "without, while others' are scraped",
    "on_scraped": "with metrics, scraped",
}


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class MetricsArguments:
    """What metrics cost a training step, and what scraping them costs.

    The demo's towers, or those of --config, on few pairs: the shorter a step, the more it shows.
    """

    config: Path | None = None
    """JSON file with (some) settings over the demo's recipe; `data.train` is then taken as it is,
    and so are its sizes."""
    ranks: Positive = 2
    pairs: Positive = 8
    """Of a rank and step, without --config."""
    steps: Positive = 200
    """Of each kind, after some that are not counted."""
    json: str | None = None
    """File for all numbers; `-` writes them as one line on stdout, and the table to stderr."""


def bench_metrics(argv: Sequence[str]) -> int:
    """`tvr bench metrics`: returns the exit code."""

    def action(prog: str) -> int:
        return _measure(tyro.cli(MetricsArguments, prog=prog, args=list(argv)))

    return bench_reported("metrics", action)


def _measure(arguments: MetricsArguments) -> int:
    with bench_folder(None, "bench metrics") as (folder, tell):
        config = with_data(arguments.config, 128, folder, tell)
        if arguments.config is None:
            pairs = arguments.pairs
            sizes = {"global_batch": pairs * arguments.ranks, "micro_batch": pairs}
            config = replace(config, train=replace(config.train, **sizes))
        tell(f"{arguments.steps} steps of each kind")
        task = Task(
            what="metrics",
            config=to_json(config),
            folder=str(folder / "run"),
            count=arguments.steps,
        )
        threads = max(1, len(os.sched_getaffinity(0)) // arguments.ranks)
        answer = run_on_ranks(task, arguments.ranks, threads)
    found = row(answer)
    sizes = {"ranks": arguments.ranks, "global_batch": config.train.global_batch}
    sizes |= of_any([answer])
    return say(arguments.json, "metrics", HOW, sizes, [found], table(found, sizes))


def row(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Medians and their ratios."""
    taken = answer["by_rank"][0]
    low, middle, high = quantiles(taken["off"], n=4)
    medians = {kind: median(taken[kind]) for kind in KINDS}
    return {
        "steps": len(taken["on"]),
        **{f"{kind}_s": seconds for kind, seconds in medians.items()},
        "ratio": medians["on"] / medians["off"],
        "ratio_of_neighbours": median(
            a / b for a, b in zip(taken["on"], taken["off"], strict=True)
        ),
        "ratio_scraped": medians["on_scraped"] / medians["on"],
        "monitor_s": median(taken["monitor"]),
        "noise": (high - low) / 2 / middle,
        "scrapes": answer["scrapes"],
        "scraped_s": answer["scraped_s"],
    }


def table(found: Mapping[str, Any], sizes: Mapping[str, Any]) -> Table:
    """One line for each kind of step."""
    result = bench_table(
        f"{sizes['global_batch']} pairs a step on {sizes['ranks']} ranks, {found['steps']} steps of"
        f" each kind; {found['scrapes']} scrapes in {found['scraped_s']:.0f} s",
        HOW,
    )
    for name in ("step", "median"):
        result.add_column(name, justify="left" if name == "step" else "right")
    for kind, name in KINDS.items():
        result.add_row(name, f"{found[f'{kind}_s'] * 1e3:.2f} ms")
    result.add_section()
    result.add_row("with metrics / without", f"{found['ratio']:.4f}")
    result.add_row("the same of neighbours", f"{found['ratio_of_neighbours']:.4f}")
    result.add_row("in the monitor", f"{found['monitor_s'] * 1e3:.3f} ms")
    result.add_row("scraped / not scraped", f"{found['ratio_scraped']:.4f}")
    result.add_row("noise", f"{found['noise']:.4f}")
    return result
