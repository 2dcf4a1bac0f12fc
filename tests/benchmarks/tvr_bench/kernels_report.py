"""What `tvr bench kernels` measured, as a table for a person and as JSON for a program."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tvr_bench.kernels_process import BACKWARD, FORWARD, Job

NAMES = {
    "reference": "naive",
    "compiled": "compiled",
    "torch": "torch tiles",
    "streamed": "streamed",
    "fast": "fast",
    "bound": "bound",
}
PASSES = {FORWARD: "forward", BACKWARD: "+ backward"}
HOW = (
    "Time: median, in a process whose heap keeps its pages (glibc), the same for all. "
    "Memory: peak above the inputs, in another process whose heap gives pages back. "
    "Bound: the bare matrix products of all padded slots, one forward, three with backward."
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One implementation in one case: by pass, bytes at the peak and seconds of each run.

    Without numbers `reason` says why; `failed` where it should have had some.
    """

    job: Job
    peaks: dict[str, int] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    reason: str | None = None
    failed: bool = False

    @property
    def case(self) -> tuple[Any, ...]:
        """What the implementations of one case have in common, ordered as they are measured."""
        job = self.job
        sizes = (job.texts, job.words, job.frames, job.width)
        return (*sizes, job.dtype, job.device, job.lengths)


def rows(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """One flat row for each measurement and pass, with its ratios within the case."""
    result = []
    for _, group in groupby(found, key=lambda x: x.case):
        of_case = list(group)
        for name in (FORWARD, BACKWARD):
            known = {x.job.implementation: x for x in of_case if x.reason is None}
            result += [_row(x, name, known) for x in of_case]
    return result


def tables(found: Sequence[Measured]) -> Group:
    """A table for each case, narrow enough for 80 columns."""
    parts = [_table(list(group)) for _, group in groupby(found, key=lambda x: x.case)]
    return Group(*parts, Text(HOW, style="dim"))


def to_json(found: Sequence[Measured], repeats: int) -> str:
    """One line: what was measured, on what, and all rows."""
    job = found[0].job
    return json.dumps(
        {
            "benchmark": "kernels",
            "interaction": job.interaction,
            "loss": job.loss,
            "repeats": repeats,
            "threads": job.threads,
            "how": HOW,
            "versions": versions(),
            "machine": machine(),
            "rows": rows(found),
        }
    )


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {x: version(x) for x in ("torch", "tvr")}


def machine() -> dict[str, str]:
    """The processor's name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": names[0] if names else platform.machine(), "system": system}


def _row(of: Measured, name: str, known: dict[str, Measured]) -> dict[str, Any]:
    job = asdict(of.job)
    row = {key: job[key] for key in ("implementation", "words", "frames", "width")}
    row |= {key: job[key] for key in ("dtype", "device", "lengths", "chunk")}
    row |= {"pairs": job["texts"], "pass": name, "reason": of.reason}
    if of.reason is not None:
        return row
    row |= {
        "median_s": median(of.times[name]),
        "fastest_s": min(of.times[name]),
        "slowest_s": max(of.times[name]),
        "peak_bytes": of.peaks[name],
    }
    if naive := known.get("reference"):
        row["time_to_naive"] = row["median_s"] / median(naive.times[name])
        row["memory_to_naive"] = row["peak_bytes"] / max(1, naive.peaks[name])
    if bound := known.get("bound"):
        row["time_to_bound"] = row["median_s"] / median(bound.times[name])
    return row


def _table(of_case: list[Measured]) -> Table:
    left_out = [f"{NAMES[x.job.implementation]}: {x.reason}" for x in of_case if x.reason]
    result = Table(
        title=_title(of_case[0].job),
        title_justify="left",
        caption="\n".join(left_out) or None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("", "", "time", "/ naive", "/ bound", "memory", "/ naive"):
        result.add_column(name, justify="right" if name else "left", no_wrap=True)
    measured = [row for row in rows(of_case) if row["reason"] is None]
    for name, group in groupby(measured, key=lambda row: row["pass"]):
        for place, row in enumerate(group):
            result.add_row(
                PASSES[name] if place == 0 else "", NAMES[row["implementation"]], *_cells(row)
            )
        result.add_section()
    return result


def _title(job: Job) -> str:
    sizes = f"{job.texts} pairs, {job.words} words ({job.lengths}), {job.frames} frames"
    loss = ", NegNCE (log)" if job.loss else ""
    threads = f"{job.threads} thread{'s' if job.threads > 1 else ''}"
    return (
        f"{sizes}, width {job.width}, {job.dtype}\n{job.interaction}{loss}, {job.device}, {threads}"
    )


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
