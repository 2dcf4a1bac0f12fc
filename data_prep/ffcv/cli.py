"""The command line of `tvr pack --format beton`; exit codes as `tvr pack`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import tyro
from pydantic.dataclasses import dataclass
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from tvr.data_prep.cli_errors import STRICT, run_command
from tvr.data_prep.ffcv.writer import write_beton


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class BetonArguments:
    """Converts a packed data set of JPEG frames to one FFCV file, a beton, which decodes faster.

    Training reads the new folder like any other data set and sees the same batches."""

    format: Literal["beton"]
    source: str
    """Folder or fsspec URL of a data set of shards in the layout frames."""
    out: str
    """Local folder to write."""
    overwrite: bool = False
    """Replace a complete beton at `out`."""


def pack_beton(argv: Sequence[str]) -> int:
    """Runs `tvr pack --format beton`; returns the exit code."""
    prog = "tvr pack"
    return run_command(prog, lambda: _pack(tyro.cli(BetonArguments, prog=prog, args=argv)))


def _pack(arguments: BetonArguments) -> int:
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        manifest = write_beton(
            arguments.source,
            arguments.out,
            overwrite=arguments.overwrite,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    assert manifest.beton is not None
    print(
        f"wrote {manifest.num_samples} clips with {manifest.num_captions} captions to"
        f" {manifest.beton.name}, {manifest.beton.shard_bytes / 1e6:.1f} MB, at {arguments.out}"
    )
    return 0
