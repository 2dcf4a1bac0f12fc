"""`tvr bench metrics`: the cost of metrics and scrapes in a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import tyro
from pydantic.dataclasses import dataclass
from rich.table import Table
from tvr_bench.harness import bench_folder, result_table, write_result
from tvr_bench.rank_task import RankTask
from tvr_bench.train import common_values, result_of, run_on_ranks, with_data

from tvr.data_prep.cli_errors import STRICT
from tvr.launchers.exit_codes import EXIT_DONE
from tvr.launchers.host_limits import host_cpus
from tvr.trainer.config import Positive, to_json

HOW = (
    "Rank 0's steps in one run, with and without metrics in turn. Blocks of 25 steps of each kind"
    " alternate: the endpoint is scraped 50 times a second, then not. Medians. Of neighbours:"
    " median ratio of each step to the next to it. Noise: half the interquartile range over the"
    " median, of steps without metrics and without scrapes."
)
KINDS = {
    "off": "without metrics",
    "on": "with metrics",
    "off_scraped": "without, scraped",
    "on_scraped": "with metrics, scraped",
}


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class MetricsArguments:
    """Cost of metrics and scrapes in a training step.

    The demo's towers, or those of --config, train on few pairs: a short step shows the cost best.
    """

    config: Path | None = None
    """JSON file with (some) settings over the demo's recipe; its `data.train` must exist, and its
    batch sizes are used."""
    ranks: Positive = 2
    pairs: Positive = 8
    """Pairs of a rank in a step, without --config."""
    steps: Positive = 200
    """Steps of each kind, after warm-up steps."""
    json: str | None = None
    """File for all numbers; `-` writes them as one line on stdout, and the table to stderr."""


def bench_metrics(argv: Sequence[str]) -> int:
    """Times steps, prints the table, writes the JSON; returns the exit code."""
    arguments = tyro.cli(MetricsArguments, prog="tvr bench metrics", args=list(argv))
    with bench_folder(None, "bench metrics") as (folder, report):
        config = with_data(arguments.config, 128, folder, report)
        if arguments.config is None:
            pairs = arguments.pairs
            sizes = {"global_batch": pairs * arguments.ranks, "micro_batch": pairs}
            config = replace(config, train=replace(config.train, **sizes))
        report(f"{arguments.steps} steps of each kind")
        task = RankTask(
            what="metrics",
            config=to_json(config),
            folder=str(folder / "run"),
            count=arguments.steps,
        )
        threads = max(1, host_cpus().usable // arguments.ranks)
        answer = run_on_ranks(task, arguments.ranks, threads)
    measured = row(answer)
    sizes = {"ranks": arguments.ranks, "global_batch": config.train.global_batch}
    sizes |= common_values([answer])
    write_result(
        arguments.json, table(measured, sizes), result_of("metrics", HOW, sizes, [measured])
    )
    return EXIT_DONE


def row(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Medians in seconds and their ratios."""
    timed = answer["by_rank"][0]
    low, middle, high = quantiles(timed["off"], n=4)
    medians = {kind: median(timed[kind]) for kind in KINDS}
    return {
        "steps": len(timed["on"]),
        **{f"{kind}_s": seconds for kind, seconds in medians.items()},
        "ratio": medians["on"] / medians["off"],
        "ratio_of_neighbours": median(
            a / b for a, b in zip(timed["on"], timed["off"], strict=True)
        ),
        "ratio_scraped": medians["on_scraped"] / medians["on"],
        "monitor_s": median(timed["monitor"]),
        "noise": (high - low) / 2 / middle,
        "scrapes": answer["scrapes"],
        "scraped_s": answer["scraped_s"],
    }


def table(measured: Mapping[str, Any], sizes: Mapping[str, Any]) -> Table:
    """One line for each kind of step, and the ratios."""
    result = result_table(
        f"{sizes['global_batch']} pairs a step on {sizes['ranks']} ranks, {measured['steps']} steps"
        f" of each kind; {measured['scrapes']} scrapes in {measured['scraped_s']:.0f} s",
        HOW,
    )
    for name in ("step", "median"):
        result.add_column(name, justify="left" if name == "step" else "right")
    for kind, name in KINDS.items():
        result.add_row(name, f"{measured[f'{kind}_s'] * 1e3:.2f} ms")
    result.add_section()
    result.add_row("with metrics / without", f"{measured['ratio']:.4f}")
    result.add_row("with / without, neighbours", f"{measured['ratio_of_neighbours']:.4f}")
    result.add_row("in the monitor", f"{measured['monitor_s'] * 1e3:.3f} ms")
    result.add_row("scraped / not scraped", f"{measured['ratio_scraped']:.4f}")
    result.add_row("noise", f"{measured['noise']:.4f}")
    return result
