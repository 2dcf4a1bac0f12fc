"""The command line of `tvr bench data`. Exit codes as `tvr bench`."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import tyro
from pydantic.dataclasses import dataclass
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tvr_bench.data_sources import PLAIN, SOURCES, STEPS, Sizes, Speed, measure
from tvr.data_prep.cli_errors import STRICT, run_command
from tvr_bench.kernels_report import machine, versions
from tvr.trainer.config import Positive

PACKAGES = ("webdataset", "pillow", "simplejpeg", "av", "ffcv", "numba", "numpy")
HOW = (
    "Medians of repeats taken in turn; a source's ratio is to plain webdataset on the same shards: "
    "JPEG by Pillow, MP4 by PyAV. First batch: from the call to the first batch at a step."
)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class DataArguments:
    """Clips a second of the sources of training batches (MP4, JPEG frames, beton), each against
    plain webdataset on the same clips; and the time to a first batch, also deep in a run."""

    clips: Positive = 48
    frames: Positive = 8
    """Of a clip in a batch."""
    size: Positive = 256
    """Pixels of both sides of clips and frames."""
    batch: Positive = 8
    workers: Positive = 2
    """Processes, or threads of FFCV."""
    epochs: Positive = 4
    """In one measurement; of the MP4 sources as well."""
    repeats: Positive = 5
    """Measurements of each source, after one that is not counted."""
    source: tuple[Literal["frames", "beton", "video"], ...] = ("frames", "beton", "video")
    """frames: JPEGs in shards; video: MP4s in shards; beton: as frames, in FFCV's file."""
    json: str | None = None
    """File for all numbers; `-` writes them as one line on stdout, and the table to stderr."""


def bench_data(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    prog = "tvr bench data"
    return run_command(prog, lambda: _bench(tyro.cli(DataArguments, prog=prog, args=list(argv))))


def _bench(arguments: DataArguments) -> int:
    sources, left_out = _sources(arguments)
    sizes = Sizes(
        clips=arguments.clips,
        frames=arguments.frames,
        size=arguments.size,
        batch=arguments.batch,
        workers=arguments.workers,
        epochs=arguments.epochs,
        repeats=arguments.repeats,
    )
    with tempfile.TemporaryDirectory() as folder, Console(stderr=True).status("bench data") as line:
        speeds = measure(Path(folder), sizes, sources, tell=lambda name: line.update(name))
    line_on_stdout = arguments.json == "-"
    Console(stderr=line_on_stdout).print(_table(speeds, sizes, left_out))
    text = json.dumps(
        {
            "benchmark": "data",
            "sizes": asdict(sizes),
            "how": HOW,
            "left_out": left_out,
            "versions": versions() | _package_versions(),
            "machine": machine(),
            "rows": rows(speeds),
        }
    )
    if line_on_stdout:
        print(text)
    elif arguments.json is not None:
        Path(arguments.json).write_text(text + "\n")
    return 0


def rows(speeds: Sequence[Speed]) -> list[dict[str, Any]]:
    """One flat row for each source."""
    medians = {speed.source: speed.median for speed in speeds}
    return [
        {
            "source": speed.source,
            "clips_per_s": speed.median,
            "slowest": min(speed.clips_per_s),
            "fastest": max(speed.clips_per_s),
            "plain": PLAIN.get(speed.source),
            "to_plain": speed.median / medians[PLAIN.get(speed.source, speed.source)],
            "first_batch_s": speed.first_batch_s,
        }
        for speed in speeds
    ]


def _sources(arguments: DataArguments) -> tuple[list[str], dict[str, str]]:
    """Those to measure with what they are held against, and why others are not."""
    asked, left_out = set(arguments.source), {}
    if "beton" in asked and find_spec("ffcv") is None:
        asked.remove("beton")
        left_out["beton"] = "FFCV is not installed (make ffcv)"
        print(f"tvr bench data: beton left out: {left_out['beton']}", file=sys.stderr)
    if not asked:
        raise ValueError("nothing to measure: --source must name one that can be")
    asked |= {PLAIN[source] for source in asked}
    return [source for source in SOURCES if source in asked], left_out


def _package_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _table(speeds: Sequence[Speed], sizes: Sizes, left_out: dict[str, str]) -> Table:
    result = Table(
        title=f"{sizes.clips} clips, {sizes.frames} frames of {sizes.size} x {sizes.size}, batches"
        f" of {sizes.batch}, {sizes.workers} workers",
        title_justify="left",
        caption="\n".join([*(f"{name}: {why}" for name, why in left_out.items()), HOW]),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("", "clips/s", "/ plain", *(f"first, step {step:,}" for step in STEPS)):
        result.add_column(name, justify="right" if name else "left")
    for row in rows(speeds):
        starts = (row["first_batch_s"].get(step) for step in STEPS)
        result.add_row(
            row["source"],
            f"{row['clips_per_s']:.0f}",
            f"{row['to_plain']:.2f}",
            *("-" if start is None else f"{start:.2f} s" for start in starts),
        )
    return result
