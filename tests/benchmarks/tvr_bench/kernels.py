"""`tvr bench kernels`: time and peak memory of every implementation of the similarity."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Annotated, Literal, TypeAlias

import tyro
from pydantic import Field
from pydantic.dataclasses import dataclass
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tvr_bench.harness import MeasurementFailed, write_result
from tvr_bench.kernels_process import Job, Unsupported, peak_bytes, seconds
from tvr_bench.kernels_report import Measurement, result, tables

from tvr.data_prep.cli_errors import STRICT
from tvr.launchers.exit_codes import EXIT_DONE, EXIT_FAILED
from tvr.launchers.host_limits import host_cpus, host_memory
from tvr.trainer.config import Positive
from tvr.trainer.memory.similarity_memory import estimate_similarity
from tvr.trainer.memory.similarity_sizes import SimilaritySizes

GIB = 2**30
# Implementations whose tiles `--chunk` sets.
CHUNKED = ("torch", "dense", "dense_compiled", "streamed")

Counts: TypeAlias = Annotated[tuple[Positive, ...], Field(min_length=1)]
Dtypes: TypeAlias = Annotated[tuple[Literal["float32", "bfloat16"], ...], Field(min_length=1)]
Devices: TypeAlias = Annotated[tuple[Literal["cpu", "cuda"], ...], Field(min_length=1)]
Lengths: TypeAlias = Annotated[tuple[Literal["full", "ragged"], ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class KernelsArguments:
    """Time and peak memory of the similarity: naive, compiled, torch tiles, dense tiles, and bound.

    The bound is the bare matrix products over all padded token pairs: one for the forward, three
    for forward + backward. Every combination of the sizes is one case. Each implementation runs in
    processes of its own: memory where the heap returns freed pages, time where it keeps them.
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
    """Dtype of the features; scores are float32 in any case."""
    device: Devices = ("cpu",)
    lengths: Lengths = ("ragged",)
    """Words of a text without padding: 4 to all, uniformly (ragged), or all (full)."""
    interaction: Literal["ti", "wti", "att_ti", "att_wti"] = "att_wti"
    matching: Literal["two_way", "words_to_frames"] = "two_way"
    loss: bool = False
    """Adds NegNCE (log mode) to the similarity, for every implementation but the bound."""
    stream: bool = False
    """Adds the streamed loss, which recomputes scores instead of keeping them; implies `loss`."""
    fast: bool = False
    """Adds the similarity whose matrix products use words and frames rounded to bfloat16."""
    compile_tiles: bool = False
    """Adds the dense tiles with torch.compile."""
    chunk: Positive | None = None
    """Texts in a tile of torch and dense tiles and of `stream`; default: their own choice."""
    repeats: Positive = 5
    """Timed runs after one warm-up run; the table shows their median."""
    threads: Positive | None = None
    """Default: one for each core."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Leaves out the naive definition if it needs more; default: the free memory."""
    json: str | None = None
    """File for all numbers; `-` writes them as one line on stdout, and the table to stderr."""


def bench_kernels(argv: Sequence[str]) -> int:
    """Measures every case, prints the table, writes the JSON; returns the exit code."""
    arguments = tyro.cli(KernelsArguments, prog="tvr bench kernels", args=list(argv))
    _check_device(arguments)
    limits = {name: _memory_limit(arguments, name) for name in arguments.device}
    jobs = list(_jobs(arguments))
    measurements = []
    with _progress() as progress:
        task = progress.add_task("", total=len(jobs), job="")
        for job in jobs:
            progress.update(task, job=f"{job.implementation}, {job.texts} pairs")
            limit = limits[job.device]
            measurements.append(measure(job, repeats=arguments.repeats, memory_limit=limit))
            progress.advance(task)
    write_result(arguments.json, tables(measurements), result(measurements, arguments.repeats))
    failed = [x for x in measurements if x.failed]
    for x in failed:
        print(f"tvr bench kernels: {x.job.implementation}: {x.reason}", file=sys.stderr)
    return EXIT_FAILED if failed else EXIT_DONE


def measure(job: Job, *, repeats: int, memory_limit: int) -> Measurement:
    """Measures one implementation in one case.

    Args:
        memory_limit: Bytes. The naive implementation is left out if its estimate is larger.
    """
    if job.implementation == "reference":
        needed = _naive_bytes(job)
        if needed > memory_limit:
            reason = f"needs about {needed / GIB:.3g} GiB, but may take {memory_limit / GIB:.3g}"
            return Measurement(job, reason=reason)
    try:
        return Measurement(job, peaks=peak_bytes(job), times=seconds(job, repeats=repeats))
    except Unsupported as unsupported:
        return Measurement(job, reason=str(unsupported))
    except MeasurementFailed as failure:
        return Measurement(job, reason=str(failure), failed=True)


def _naive_bytes(job: Job) -> int:
    sizes = SimilaritySizes(
        texts=job.texts,
        videos=job.videos,
        words=job.words,
        frames=job.frames,
        width=job.width,
        interaction=job.interaction,
        matching=job.matching,
        backend="naive",
        bytes_per_number=4 if job.dtype == "float32" else 2,
        device=job.device,
    )
    return estimate_similarity(sizes).above_inputs


def _jobs(arguments: KernelsArguments) -> Iterator[Job]:
    optional = ("dense_compiled",) * arguments.compile_tiles
    optional += ("streamed",) * arguments.stream + ("fast",) * arguments.fast
    implementations = ("reference", "compiled", "torch", "dense", *optional, "bound")
    kinds = (arguments.device, arguments.dtype, arguments.lengths)
    sizes = (arguments.width, arguments.frames, arguments.words, arguments.pairs)
    for device, dtype, lengths, width, frames, words, pairs in product(*kinds, *sizes):
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
            matching=arguments.matching,
            lengths=lengths,
            loss=arguments.loss or arguments.stream,
            threads=arguments.threads or host_cpus().usable,
        )
        for name in implementations:
            chunk = arguments.chunk if name in CHUNKED else None
            yield replace(case, implementation=name, chunk=chunk)


def _check_device(arguments: KernelsArguments) -> None:
    if "cuda" not in arguments.device:
        return
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu")


def _memory_limit(arguments: KernelsArguments, device: str) -> int:
    """Bytes that one implementation may take on the device."""
    if arguments.memory_gib is not None:
        return int(arguments.memory_gib * GIB)
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    return host_memory().available


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
