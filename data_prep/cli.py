"""The command line of `tvr pack`.

Exit codes: 0 done; 2 bad usage, bad input or too many bad clips.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Literal

import tyro
from pydantic.dataclasses import dataclass

from tvr.data_prep.annotations.benchmarks import Dataset, read_benchmark
from tvr.data_prep.cli_errors import STRICT, run_command
from tvr.data_prep.dataset.manifest import BAD_NAME, Layout, Manifest, join_url
from tvr.data_prep.limited_process import TIME_S, ProcessLimits
from tvr.data_prep.packing.pack import AnnotationFile, pack_shards
from tvr.data_prep.packing.pack_metrics import serve_metrics
from tvr.data_prep.packing.progress import show_planning, show_progress
from tvr.data_prep.packing.worker_pool import available_processes
from tvr.data_prep.records import Clip, RefusedRow, TooManyBadSamples
from tvr.data_prep.video.frame_sampling import FrameSpacing


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class PackArguments:
    """Packs annotated videos into WebDataset shards with a manifest.

    `tvr pack --format beton` converts a packed data set to an FFCV file (see its --help)."""

    format: Literal["webdataset"] = "webdataset"
    """Format of the data set to write."""
    annotations: str
    """JSONL, JSON, CSV, TSV or Parquet file (path or fsspec URL); with --dataset the folder of the
    benchmark's files."""
    out: str
    """Folder or fsspec URL of the data set to write."""
    layout: Layout
    """frames: JPEGs, sampled while packing; video: MP4 files, sampled when read."""
    videos: str | None = None
    """Folder or URL of relative video paths and of videos looked up by name; default: the folder
    of the annotations."""
    dataset: Dataset | None = None
    """Benchmark whose published files are in the folder --annotations."""
    split: str | None = None
    """Split of the benchmark; msrvtt: train-9k, train-7k, test-1ka, train-1kb, test-1kb; msvd and
    didemo: train, val, test; activitynet: train, val; vatex: train, val, test, val-1500, test-1500;
    lsmdc: train, val, test; youcook2: train, val; webvid: train-2m, val-2m, train-10m, val-10m."""
    num_frames: int = 12
    """Frames per clip (layout frames)."""
    frame_spacing: FrameSpacing = "time"
    """time: frames of segments of equal time; index: of segments with equally many frames (layout
    frames). Both are the same for a constant frame rate."""
    short_side: int | None = None
    """Pixels of the shorter side; default: size of the source."""
    jpeg_quality: int = 90
    """1 to 100 (layout frames)."""
    samples_per_shard: int = 1000
    """Clips per shard."""
    shard_bytes: int = 1 << 30
    """A shard that would be larger is split into several tar files of at most this size."""
    shuffle_seed: int | None = 0
    """Seed of the order of clips, in which the cuts of one video stay together; None keeps the
    order of the annotations."""
    max_bad: int = 0
    """Bad clips (missing, unreadable, without caption) and bad rows of the annotations that packing
    leaves out; with more of them it fails."""
    reencode: bool = False
    """Re-encode to H.264 (layout video); default: decode MP4 files once and copy them."""
    keyframe_interval: int = 16
    """Frames between keyframes when re-encoding."""
    processes: int | None = None
    """Processes that read and convert clips; default: one for each available CPU. 0: this process,
    without the limits of memory and time."""
    clip_memory_gb: float | None = None
    """Memory in GB that a process may take for a clip; default: 0.8 of the available memory divided
    by the processes, at least 1.07 (1 GiB). A clip that needs more is refused (out_of_memory)."""
    clip_timeout_s: float = TIME_S
    """Seconds without a byte while a video is read, and then for its conversion, with 10 s more for
    each MiB of the video. A clip that exceeds this twice is refused (timed_out)."""
    task: str | None = None
    """i/n with 0 <= i < n: pack only this share of the shards; the last task completes the data
    set."""
    plan_only: bool = False
    """Read the annotations, store the plan of all shards at `out` and end. Tasks that start later
    read their shares of it; without this, one of them plans while the others wait."""
    packing_id: str | None = None
    """With --overwrite and --task: a name that all tasks of one launch have in common, so that a
    task that starts again does not replace their data set; default: the id of the SLURM array."""
    words: bool = True
    """Tag the words of English captions, as `data.word_drop` and `data.content_words` need."""
    metrics_port: int | None = None
    """Port of the Prometheus metrics of packing (see `tvr metrics`); 0: any free port."""
    metrics_address: str = "127.0.0.1"
    """IP address of the network interface for the metrics; 0.0.0.0: all, for a Prometheus on
    another machine."""
    overwrite: bool = False
    """Replace a complete data set at `out`, or an unfinished packing of other clips or settings."""


def pack(argv: Sequence[str]) -> int:
    """Runs `tvr pack` and returns the exit code."""
    if _is_beton_format(argv):
        from tvr.data_prep.ffcv.cli import pack_beton

        return pack_beton(argv)
    return run_command(
        "tvr pack", lambda: _pack(tyro.cli(PackArguments, prog="tvr pack", args=argv))
    )


def _is_beton_format(argv: Sequence[str]) -> bool:
    # The format comes first: the two formats have different options.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--format")
    return parser.parse_known_args(argv)[0].format == "beton"


def _pack(arguments: PackArguments) -> int:
    task, num_tasks = _task(arguments.task)
    processes = arguments.processes
    if processes is None:
        processes = available_processes()
    memory_gb = arguments.clip_memory_gb
    limits = ProcessLimits(
        memory_bytes=None if memory_gb is None else int(memory_gb * 1e9),
        time_s=arguments.clip_timeout_s,
    )
    clips = _clips(arguments)
    with (
        show_planning("planning") as show_plan,
        show_progress("packing") as show,
        serve_metrics(show, arguments.metrics_port, arguments.metrics_address) as on_progress,
    ):
        manifest = pack_shards(
            clips,
            arguments.out,
            layout=arguments.layout,
            num_frames=arguments.num_frames,
            frame_spacing=arguments.frame_spacing,
            short_side=arguments.short_side,
            jpeg_quality=arguments.jpeg_quality,
            samples_per_shard=arguments.samples_per_shard,
            shard_bytes=arguments.shard_bytes,
            shuffle_seed=arguments.shuffle_seed,
            max_bad=arguments.max_bad,
            reencode=arguments.reencode,
            keyframe_interval=arguments.keyframe_interval,
            words=arguments.words,
            overwrite=arguments.overwrite,
            processes=processes,
            limits=limits,
            task=task,
            num_tasks=num_tasks,
            packing_id=arguments.packing_id,
            plan_only=arguments.plan_only,
            on_plan=show_plan,
            on_progress=on_progress,
        )
    if manifest is None and arguments.plan_only:
        print(f"planned; pack the shards at {arguments.out} with the same settings and --task i/n")
        return 0
    if manifest is None and arguments.task is None:
        raise ValueError(
            f"{arguments.out}: files of complete shards were missing or damaged; repeat the command"
            " to pack them again"
        )
    if manifest is None:
        print(
            f"task {arguments.task} packed its shards; the last task completes the data set at"
            f" {arguments.out}"
        )
        return 0
    _print_summary(manifest, arguments.out)
    return 0


def _print_summary(manifest: Manifest, out: str) -> None:
    megabytes = sum(shard.shard_bytes for shard in manifest.shards) / 1e6
    print(
        f"packed {manifest.num_samples} clips with {manifest.num_captions} captions into"
        f" {len(manifest.shards)} shards, {megabytes:.1f} MB, at {out}"
    )
    if manifest.num_empty_captions:
        print(f"dropped {manifest.num_empty_captions} empty captions")
    if manifest.bad:
        counts = ", ".join(f"{count} {reason}" for reason, count in manifest.bad.items())
        list_url = join_url(out, BAD_NAME)
        print(f"left out {sum(manifest.bad.values())} clips ({counts}), listed in {list_url}")


def _task(text: str | None) -> tuple[int, int]:
    """Parses --task: "1/8" gives (1, 8), and None gives (0, 1)."""
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"task={text!r} must be i/n with 0 <= i < n, such as 0/8 (--task)")
    return int(match[1]), int(match[2])


def _clips(arguments: PackArguments) -> Sequence[Clip | RefusedRow] | AnnotationFile:
    if arguments.dataset is None:
        if arguments.split is not None:
            raise ValueError(f"split={arguments.split!r} needs a benchmark: set --dataset")
        return AnnotationFile(arguments.annotations, arguments.videos)
    selection = read_benchmark(
        arguments.dataset,
        arguments.split,
        annotations=arguments.annotations,
        videos=arguments.videos or arguments.annotations,
    )
    # Printed before packing, which may take hours.
    print("\n".join(selection.summary()), flush=True)
    if missing := selection.without_file[max(arguments.max_bad, 0) :]:
        raise TooManyBadSamples(
            f"{len(selection.without_file)} videos of {selection.name} have no file, more than"
            f" max_bad={arguments.max_bad}; the last is {missing[-1]}; nothing was packed"
        )
    return (*selection.refused, *selection.clips)
