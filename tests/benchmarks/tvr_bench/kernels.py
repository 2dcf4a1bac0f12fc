"""The command line of `tvr bench`; the kernels' part: what it measures, and when it does not.

Exit codes: 0 done; 2 bad usage; 3 a measurement broke off.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import tyro
from pydantic import Field
from pydantic.dataclasses import dataclass
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tvr.data_prep.cli_errors import STRICT, run_command
from tvr.launchers.exit_codes import EXIT_DONE, EXIT_FAILED
from tvr_bench.kernels_report import Measured, tables, to_json
from tvr_bench.kernels_process import Job, MeasurementFailed, Refused, peak_bytes, seconds
from tvr.trainer.config import Positive
from tvr.trainer.memory.memory import estimate
from tvr.trainer.memory.sizes import Sizes

GIB = 2**30

Counts: TypeAlias = Annotated[tuple[Positive, ...], Field(min_length=1)]
Dtypes: TypeAlias = Annotated[tuple[Literal["float32", "bfloat16"], ...], Field(min_length=1)]
Devices: TypeAlias = Annotated[tuple[Literal["cpu", "cuda"], ...], Field(min_length=1)]
Lengths: TypeAlias = Annotated[tuple[Literal["full", "ragged"], ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class KernelsArguments:
    """Time and peak memory of the similarity: naive definition, compiled, torch tiles, and bound.

    The bound is the bare matrix products over all padded token pairs: one for the forward, three
    for forward + backward. Every combination of the sizes is one case. Each implementation runs in
    processes of its own: memory where the heap gives freed pages back, time where it keeps them.
    """

    pairs: Counts = (128, 256, 512)
    """Texts, and as many videos."""
    words: Counts = (32,)
    """Word slots of a text."""
    frames: Counts = (12,)
    """Frames of a video."""
    width: Counts = (512,)
    """Length of a feature vector."""
    dtype: Dtypes = ("float32",)
    """Of the features; scores are float32 in any case."""
    device: Devices = ("cpu",)
    lengths: Lengths = ("ragged",)
    """Words that are no padding: 4 to all, uniformly (ragged), or all (full)."""
    interaction: Literal["ti", "wti", "att_ti", "att_wti"] = "att_wti"
    loss: bool = False
    """Also NegNCE (log mode) behind the similarity, for every implementation but the bound."""
    stream: bool = False
    """Also the loss that computes its scores anew where it needs them; turns `loss` on."""
    fast: bool = False
    """Also the similarity with words and frames rounded to bfloat16 where they meet."""
    chunk: Positive | None = None
    """Texts in a tile of the torch backend and of `stream`; default: their own choice."""
    repeats: Positive = 5
    """Timed runs, after one that is not counted; their median is shown."""
    threads: Positive | None = None
    """Default: one for each core."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """The naive definition is left out where it would take more; default: what is free."""
    json: str | None = None
    """File for all numbers; `-` writes them as one line on stdout, and the table to stderr."""


def bench(argv: Sequence[str]) -> int:
    """`tvr bench`: returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="tvr bench",
        usage="tvr bench {kernels,data,train,save,metrics} ...",
        epilog="`tvr bench kernels --help` and so on describe them.",
    )
    what = (
        "kernels: the similarity and its loss; data: the sources of training batches; "
        "train: the parts of a training step, and more ranks; save: what a step waits for a save; "
        "metrics: what they cost a step"
    )
    parser.add_argument("what", choices=["kernels", "data", "train", "save", "metrics"], help=what)
    chosen = parser.parse_args(list(argv[:1])).what
    if chosen == "data":
        from tvr_bench.data import bench_data

        return bench_data(argv[1:])
    if chosen == "metrics":
        from tvr_bench.metrics import bench_metrics

        return bench_metrics(argv[1:])
    if chosen in ("train", "save"):
        from tvr_bench.train import bench_save, bench_train

        return (bench_train if chosen == "train" else bench_save)(argv[1:])

    def action() -> int:
        line = tyro.cli(KernelsArguments, prog="tvr bench kernels", args=list(argv[1:]))
        return bench_kernels(line)

    return run_command("tvr bench kernels", action)


def bench_kernels(arguments: KernelsArguments) -> int:
    """Measures every case, shows the table, writes the JSON."""
    _check_device(arguments)
    limits = {name: _limit(arguments, name) for name in arguments.device}
    jobs = list(_jobs(arguments))
    found = []
    with _progress() as progress:
        task = progress.add_task("", total=len(jobs), job="")
        for job in jobs:
            progress.update(task, job=f"{job.implementation}, {job.texts} pairs")
            found.append(measured(job, repeats=arguments.repeats, limit=limits[job.device]))
            progress.advance(task)
    line_on_stdout = arguments.json == "-"
    Console(stderr=line_on_stdout).print(tables(found))
    if line_on_stdout:
        print(to_json(found, arguments.repeats))
    elif arguments.json is not None:
        Path(arguments.json).write_text(to_json(found, arguments.repeats) + "\n")
    failed = [x for x in found if x.failed]
    for x in failed:
        print(f"tvr bench kernels: {x.job.implementation}: {x.reason}", file=sys.stderr)
    return EXIT_FAILED if failed else EXIT_DONE


def measured(job: Job, *, repeats: int, limit: int) -> Measured:
    """One implementation in one case; `limit` is what the naive one may take, in bytes."""
    if job.implementation == "reference":
        needed = _naive_bytes(job)
        if needed > limit:
            return Measured(
                job, reason=f"needs about {needed / GIB:.3g} GiB, but may take {limit / GIB:.3g}"
            )
    try:
        return Measured(job, peaks=peak_bytes(job), times=seconds(job, repeats=repeats))
    except Refused as refused:
        return Measured(job, reason=str(refused))
    except MeasurementFailed as failure:
        return Measured(job, reason=str(failure), failed=True)


def _naive_bytes(job: Job) -> int:
    sizes = Sizes(
        texts=job.texts,
        videos=job.videos,
        words=job.words,
        frames=job.frames,
        width=job.width,
        interaction=job.interaction,
        backend="naive",
        bytes_per_number=4 if job.dtype == "float32" else 2,
        device=job.device,
    )
    return estimate(sizes).above_inputs


def _jobs(arguments: KernelsArguments) -> Iterator[Job]:
    asked = ("streamed",) * arguments.stream + ("fast",) * arguments.fast
    implementations = ("reference", "compiled", "torch", *asked, "bound")
    lists = (arguments.device, arguments.dtype, arguments.lengths)
    sizes = (arguments.width, arguments.frames, arguments.words, arguments.pairs)
    for device, dtype, lengths, width, frames, words, pairs in product(*lists, *sizes):
        case = Job(
            implementation="",
            texts=pairs,
            videos=pairs,
            words=words,
            frames=frames,
            width=width,
            dtype=dtype,
            device=device,
            interaction=arguments.interaction,
            lengths=lengths,
            loss=arguments.loss or arguments.stream,
            threads=arguments.threads or len(os.sched_getaffinity(0)),
        )
        for name in implementations:
            chunk = arguments.chunk if name in ("torch", "streamed") else None
            yield replace(case, implementation=name, chunk=chunk)


def _check_device(arguments: KernelsArguments) -> None:
    if "cuda" not in arguments.device:
        return
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu")


def _limit(arguments: KernelsArguments, device: str) -> int:
    """Bytes that one implementation may take on the device."""
    if arguments.memory_gib is not None:
        return int(arguments.memory_gib * GIB)
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    # A container may allow less than the machine has; `max` there means no bound.
    bound, used = (Path("/sys/fs/cgroup", f"memory.{name}") for name in ("max", "current"))
    if bound.exists() and (allowed := bound.read_text().strip()) != "max":
        free = min(free, int(allowed) - int(used.read_text()))
    return free


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("bench"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[job]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
