"""Results of `tvr bench kernels`: tables for the terminal, rows for the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from statistics import median
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from tvr_bench.harness import machine, result_table, versions
from tvr_bench.kernels_process import BACKWARD, FORWARD, Job

NAMES = {
    "reference": "naive",
    "compiled": "compiled",
    "torch": "torch tiles",
    "dense": "dense tiles",
    "dense_compiled": "dense, torch.compile",
    "streamed": "streamed",
    "fast": "fast",
    "bound": "bound",
}
PASSES = {FORWARD: "forward", BACKWARD: "+ backward"}
HOW = (
    "Time: median, in a process whose heap keeps its pages (glibc). "
    "Memory: peak above the inputs, in another process whose heap returns pages. "
    "Bound: the bare matrix products of all padded slots, one forward, three with backward."
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Numbers of one implementation in one case, or the reason why there are none."""

    job: Job
    peaks: dict[str, int] = field(default_factory=dict)
    """Bytes at the peak of each pass."""
    times: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of each run of each pass."""
    reason: str | None = None
    """Why there are no numbers."""
    failed: bool = False
    """True if the measurement broke; False with a `reason` if the job is unsupported."""

    @property
    def case(self) -> tuple[Any, ...]:
        """Sizes and kind that the implementations of one case share; they are measured in a row."""
        job = self.job
        sizes = (job.texts, job.words, job.frames, job.width)
        return (*sizes, job.dtype, job.device, job.lengths)


def rows(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """One flat row for each measurement and pass, with ratios to the naive one and the bound."""
    all_rows = []
    for _, group in groupby(measurements, key=lambda x: x.case):
        case = list(group)
        for name in (FORWARD, BACKWARD):
            numbers = {x.job.implementation: x for x in case if x.reason is None}
            all_rows += [_row(x, name, numbers) for x in case]
    return all_rows


def tables(measurements: Sequence[Measurement]) -> Group:
    """A table for each case, narrow enough for 80 columns."""
    parts = [_table(list(group)) for _, group in groupby(measurements, key=lambda x: x.case)]
    return Group(*parts, Text(HOW, style="dim"))


def result(measurements: Sequence[Measurement], repeats: int) -> dict[str, Any]:
    """The JSON: settings, versions, machine and all rows."""
    job = measurements[0].job
    return {
        "benchmark": "kernels",
        "interaction": job.interaction,
        "matching": job.matching,
        "loss": job.loss,
        "repeats": repeats,
        "threads": job.threads,
        "how": HOW,
        "versions": versions(),
        "machine": machine(),
        "rows": rows(measurements),
    }


def _row(one: Measurement, name: str, numbers: dict[str, Measurement]) -> dict[str, Any]:
    job = asdict(one.job)
    row = {key: job[key] for key in ("implementation", "words", "frames", "width")}
    row |= {key: job[key] for key in ("dtype", "device", "lengths", "chunk")}
    row |= {"pairs": job["texts"], "pass": name, "reason": one.reason}
    if one.reason is not None:
        return row
    row |= {
        "median_s": median(one.times[name]),
        "fastest_s": min(one.times[name]),
        "slowest_s": max(one.times[name]),
        "peak_bytes": one.peaks[name],
    }
    if naive := numbers.get("reference"):
        row["time_to_naive"] = row["median_s"] / median(naive.times[name])
        row["memory_to_naive"] = row["peak_bytes"] / max(1, naive.peaks[name])
    if bound := numbers.get("bound"):
        row["time_to_bound"] = row["median_s"] / median(bound.times[name])
    return row


def _table(case: list[Measurement]) -> Table:
    left_out = [f"{NAMES[x.job.implementation]}: {x.reason}" for x in case if x.reason]
    table = result_table(_title(case[0].job), "\n".join(left_out) or None)
    for name in ("", "", "time", "/ naive", "/ bound", "memory", "/ naive"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    measured = [row for row in rows(case) if row["reason"] is None]
    for name, group in groupby(measured, key=lambda row: row["pass"]):
        for index, row in enumerate(group):
            table.add_row(
                PASSES[name] if index == 0 else "", NAMES[row["implementation"]], *_cells(row)
            )
        table.add_section()
    return table


def _title(job: Job) -> str:
    sizes = f"{job.texts} pairs, {job.words} words ({job.lengths}), {job.frames} frames"
    loss = ", NegNCE (log)" if job.loss else ""
    threads = f"{job.threads} thread{'s' if job.threads > 1 else ''}"
    one_way = "" if job.matching == "two_way" else f", {job.matching}"
    kind = f"{job.interaction}{one_way}{loss}"
    return f"{sizes}, width {job.width}, {job.dtype}\n{kind}, {job.device}, {threads}"


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        _seconds(row["median_s"]),
        _ratio(row.get("time_to_naive")),
        _ratio(row.get("time_to_bound")),
        _megabytes(row["peak_bytes"]),
        _ratio(row.get("memory_to_naive")),
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _megabytes(value: int) -> str:
    return f"{value / 1e6:.0f} MB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
