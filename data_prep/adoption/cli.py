"""The command line of `tvr adopt`.

Exit codes: 0 done; 2 bad usage, bad input or too many bad samples; 3 the storage fails for the
moment.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Annotated

import tyro
from pydantic.dataclasses import dataclass

from tvr.data_prep.adoption.adopt import AdoptProgress, adopt_shards
from tvr.data_prep.cli_errors import STRICT, run_command
from tvr.data_prep.dataset.foreign_samples import CAPTION_SOURCES
from tvr.data_prep.dataset.manifest import BAD_NAME, join_url
from tvr.data_prep.limited_process import TIME_S, ProcessLimits
from tvr.data_prep.packing.worker_pool import available_processes

LINE_EVERY_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class AdoptArguments:
    """Makes a data set of shards that other tools wrote, such as video2dataset: tar archives of
    KEY.mp4, KEY.txt and KEY.json. The archives stay as they are; an index is written beside them.
    Repeat the command if it is interrupted."""

    url: Annotated[str, tyro.conf.Positional]
    """Folder or fsspec URL with the archives (*.tar)."""
    out: str | None = None
    """Folder or fsspec URL for the index, if nothing can be written where the archives lie;
    default: the folder of the archives. The archives must stay where they are."""
    captions: tuple[str, ...] = CAPTION_SOURCES
    """Where captions come from, in this order: txt (the .txt file), or names of fields of the
    JSON, each a text or a list of texts."""
    max_bad: int = 0
    """Bad samples (no video, unreadable, without caption) that are left out."""
    processes: int | None = None
    """Archives to read at a time; default: one for each available CPU. 0: one after another in this
    process, without the limits of memory and time."""
    clip_memory_gb: float | None = None
    """Memory in GB that a process may take; default: 0.8 of the available memory divided by the
    processes, at least 1.07 (1 GiB). A video that needs more is left out (out_of_memory)."""
    clip_timeout_s: float = TIME_S
    """Seconds without a byte while an archive is read, and for a video, with 10 s more for each MiB
    of it. A video that exceeds this twice is left out (timed_out)."""
    overwrite: bool = False
    """Adopt again a folder that was adopted before."""


def adopt(argv: Sequence[str]) -> int:
    """Runs `tvr adopt`; returns the exit code."""
    return run_command(
        "tvr adopt", lambda: _adopt(tyro.cli(AdoptArguments, prog="tvr adopt", args=argv))
    )


def _adopt(arguments: AdoptArguments) -> int:
    out = arguments.out or arguments.url
    processes, memory_gb = arguments.processes, arguments.clip_memory_gb
    manifest = adopt_shards(
        arguments.url,
        out=arguments.out,
        captions=arguments.captions,
        max_bad=arguments.max_bad,
        processes=available_processes() if processes is None else processes,
        limits=ProcessLimits(
            memory_bytes=None if memory_gb is None else int(memory_gb * 1e9),
            time_s=arguments.clip_timeout_s,
        ),
        overwrite=arguments.overwrite,
        on_progress=_Lines(),
    )
    print(
        f"adopted {manifest.num_samples} samples with {manifest.num_captions} captions in"
        f" {len(manifest.shards)} archives at {arguments.url}, indexed at {out}"
    )
    if manifest.bad:
        counts = ", ".join(f"{count} {reason}" for reason, count in manifest.bad.items())
        print(
            f"left out {sum(manifest.bad.values())} samples ({counts}), listed in"
            f" {join_url(out, BAD_NAME)}"
        )
    return 0


class _Lines:
    """Prints the progress on stderr, a line every 30 s."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def __call__(self, progress: AdoptProgress) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s >= LINE_EVERY_S:
            self._last_s = now_s
            print(
                f"adopting: {progress.num_done:,} of {progress.num_tars:,} archives,"
                f" {progress.num_samples:,} samples, {progress.num_bad:,} bad",
                file=sys.stderr,
                flush=True,
            )
