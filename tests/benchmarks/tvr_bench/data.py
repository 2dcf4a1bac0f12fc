"""`tvr bench data`: clips a second of the sources of training batches, as table and JSON."""

from __future__ import annotations

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
from rich.console import Console
from rich.table import Table
from tvr_bench.data_sources import PLAIN, SOURCES, STEPS, DataBenchSizes, Speed, measure
from tvr_bench.harness import machine, result_table, versions, write_result

from tvr.data_prep.cli_errors import STRICT
from tvr.launchers.exit_codes import EXIT_DONE
from tvr.trainer.config import Positive

PACKAGES = ("webdataset", "pillow", "simplejpeg", "av", "ffcv", "numba", "numpy")
HOW = (
    "Medians of repeats in which the sources take turns. Plain: webdataset on the same shards, "
    "JPEG by Pillow, MP4 by PyAV. First batch: from the call to the first batch at a step."
)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class DataArguments:
    """Clips a second of the sources of training batches: MP4, JPEG frames, beton.

    Each source is compared with plain webdataset on the same clips. The time to a first batch is
    also measured at a late step of a run.
    """

    clips: Positive = 48
    frames: Positive = 8
    """Frames of a clip in a batch."""
    size: Positive = 256
    """Height and width of clips and frames in pixels."""
    clip_frames: Positive = 64
    """Frames of a clip's video; 64 are two or three seconds."""
    keyframe_interval: Positive = 250
    """Most frames from one keyframe of a clip's video to the next; x264 uses 250."""
    batch: Positive = 8
    workers: Positive = 2
    """Worker processes, or threads of FFCV."""
    epochs: Positive = 4
    """Epochs in one measurement."""
    repeats: Positive = 5
    """Measurements of each source, after a warm-up."""
    source: tuple[Literal["frames", "beton", "video", "reencoded"], ...] = (
        "frames",
        "beton",
        "video",
        "reencoded",
    )
    """frames: JPEGs in shards; video: MP4s in shards; reencoded: the same by `tvr pack --reencode`;
    beton: JPEGs in FFCV's file."""
    json: str | None = None
    """File for all numbers; `-` writes them as one line on stdout, and the table to stderr."""


def bench_data(argv: Sequence[str]) -> int:
    """Measures the sources, prints the table, writes the JSON; returns the exit code."""
    arguments = tyro.cli(DataArguments, prog="tvr bench data", args=list(argv))
    sources, left_out = _sources(arguments)
    sizes = DataBenchSizes(
        clips=arguments.clips,
        frames=arguments.frames,
        size=arguments.size,
        clip_frames=arguments.clip_frames,
        keyframe_interval=arguments.keyframe_interval,
        batch=arguments.batch,
        workers=arguments.workers,
        epochs=arguments.epochs,
        repeats=arguments.repeats,
    )
    with tempfile.TemporaryDirectory() as folder, Console(stderr=True).status("bench data") as line:
        speeds = measure(Path(folder), sizes, sources, report=line.update)
    result = {
        "benchmark": "data",
        "sizes": asdict(sizes),
        "how": HOW,
        "left_out": left_out,
        "versions": versions() | _package_versions(),
        "machine": machine(),
        "rows": rows(speeds),
    }
    write_result(arguments.json, _table(speeds, sizes, left_out), result)
    return EXIT_DONE


def rows(speeds: Sequence[Speed]) -> list[dict[str, Any]]:
    """One flat row for each source, with its ratio to plain webdataset."""
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
    """The sources to measure, plain ones included, and the reasons why others are left out."""
    wanted: set[str] = set(arguments.source)
    left_out = {}
    if "beton" in wanted and find_spec("ffcv") is None:
        wanted.remove("beton")
        left_out["beton"] = "FFCV is not installed (make ffcv)"
        print(f"tvr bench data: beton left out: {left_out['beton']}", file=sys.stderr)
    if not wanted:
        raise ValueError("nothing to measure: --source must name a source that is installed")
    if wanted & {"video", "reencoded"}:
        wanted.add("unindexed")
    wanted |= {PLAIN[source] for source in wanted}
    return [source for source in SOURCES if source in wanted], left_out


def _package_versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _table(speeds: Sequence[Speed], sizes: DataBenchSizes, left_out: dict[str, str]) -> Table:
    result = result_table(
        f"{sizes.clips} clips, {sizes.frames} frames of {sizes.size} x {sizes.size}, batches"
        f" of {sizes.batch}, {sizes.workers} workers",
        "\n".join([*(f"{name}: {reason}" for name, reason in left_out.items()), HOW]),
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
