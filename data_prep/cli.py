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
from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.cli_errors import STRICT, run_command
from tvr.data_prep.dataset.manifest import BAD_NAME, Layout, Manifest, join
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.packing.pack_metrics import serve_metrics
from tvr.data_prep.packing.progress import show_progress
from tvr.data_prep.packing.worker_pool import available_processes
from tvr.data_prep.records import Clip, TooManyBadSamples


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class PackArguments:
    """Packs annotated videos into WebDataset shards with a manifest.

    A packed data set becomes an FFCV file with `tvr pack --format beton` (see its --help)."""

    format: Literal["webdataset"] = "webdataset"
    """Of the data set to write."""
    annotations: str
    """JSONL, CSV or Parquet file (path or fsspec URL); with --dataset the folder of its files."""
    out: str
    """Folder or fsspec URL of the data set to write."""
    layout: Layout
    """frames: JPEGs sampled now; video: the MP4 itself, sampled when read."""
    videos: str | None = None
    """Folder or URL that relative video paths start from, or in which videos are searched by name;
    default: the annotations' folder."""
    dataset: Dataset | None = None
    """Benchmark whose published files are in the folder --annotations."""
    split: str | None = None
    """Split of the benchmark; msrvtt: train-9k, train-7k, test-1ka, train-1kb, test-1kb; msvd and
    didemo: train, val, test; activitynet: train, val."""
    num_frames: int = 12
    """Frames per clip (layout frames)."""
    short_side: int | None = None
    """Pixels of the shorter side; default: as the source."""
    jpeg_quality: int = 90
    """1 to 100 (layout frames)."""
    samples_per_shard: int = 1000
    """Clips per tar file."""
    max_bad: int = 0
    """Clips that may be refused (missing, unreadable, without caption) before packing gives up."""
    reencode: bool = False
    """Re-encode to H.264 (layout video); otherwise MP4 files are copied after decoding them
    once."""
    keyframe_interval: int = 16
    """Frames between keyframes when re-encoding."""
    processes: int | None = None
    """Processes that read and convert clips; default: one for each CPU available."""
    task: str | None = None
    """i/n with 0 <= i < n: pack this share of the shards only; the last task to end completes the
    data set."""
    words: bool = True
    """Find the words of captions (English) that `data.word_drop` and `data.content_words` need."""
    metrics_port: int | None = None
    """Port at which Prometheus finds how far the packing is (`tvr metrics`); 0: any free one."""
    overwrite: bool = False
    """Replace a complete data set at `out`, or an unfinished packing of something else."""


def pack(argv: Sequence[str]) -> int:
    """`tvr pack`: returns the exit code."""
    if _asks_for_beton(argv):
        from tvr.data_prep.ffcv.cli import pack_beton

        return pack_beton(argv)
    return run_command(
        "tvr pack", lambda: _pack(tyro.cli(PackArguments, prog="tvr pack", args=argv))
    )


def _asks_for_beton(argv: Sequence[str]) -> bool:
    # Its other options are not those of packing videos.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--format")
    return parser.parse_known_args(argv)[0].format == "beton"


def _pack(arguments: PackArguments) -> int:
    task, num_tasks = _task(arguments.task)
    processes = arguments.processes
    if processes is None:
        processes = available_processes()
    clips = _clips(arguments)
    with (
        show_progress("packing") as show,
        serve_metrics(show, arguments.metrics_port) as on_progress,
    ):
        manifest = pack_shards(
            clips,
            arguments.out,
            layout=arguments.layout,
            num_frames=arguments.num_frames,
            short_side=arguments.short_side,
            jpeg_quality=arguments.jpeg_quality,
            samples_per_shard=arguments.samples_per_shard,
            max_bad=arguments.max_bad,
            reencode=arguments.reencode,
            keyframe_interval=arguments.keyframe_interval,
            words=arguments.words,
            overwrite=arguments.overwrite,
            processes=processes,
            task=task,
            num_tasks=num_tasks,
            on_progress=on_progress,
        )
    if manifest is None:
        print(
            f"task {arguments.task} packed its shards; the data set at {arguments.out} is complete"
            " when the last task is"
        )
        return 0
    _tell(manifest, arguments.out)
    return 0


def _tell(manifest: Manifest, out: str) -> None:
    megabytes = sum(shard.shard_bytes for shard in manifest.shards) / 1e6
    print(
        f"packed {manifest.num_samples} clips with {manifest.num_captions} captions into"
        f" {len(manifest.shards)} shards, {megabytes:.1f} MB, at {out}"
    )
    if manifest.num_empty_captions:
        print(f"dropped {manifest.num_empty_captions} empty captions")
    if manifest.bad:
        counts = ", ".join(f"{count} {reason}" for reason, count in manifest.bad.items())
        listed = join(out, BAD_NAME)
        print(f"left out {sum(manifest.bad.values())} clips ({counts}), listed in {listed}")


def _task(text: str | None) -> tuple[int, int]:
    """ "1/8" -> (1, 8); without a task (0, 1)."""
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(f"task={text!r} must be i/n with 0 <= i < n, such as 0/8 (--task)")
    return int(found[1]), int(found[2])


def _clips(arguments: PackArguments) -> Sequence[Clip]:
    if arguments.dataset is None:
        if arguments.split is not None:
            raise ValueError(f"split={arguments.split!r} is of a benchmark: name it with --dataset")
        return read_annotations(arguments.annotations, videos=arguments.videos)
    selection = read_benchmark(
        arguments.dataset,
        arguments.split,
        annotations=arguments.annotations,
        videos=arguments.videos or arguments.annotations,
    )
    # Before the hours that packing may take.
    print("\n".join(selection.summary()), flush=True)
    if missing := selection.without_file[max(arguments.max_bad, 0) :]:
        raise TooManyBadSamples(
            f"{len(selection.without_file)} videos of {selection.name} without a file, more than"
            f" max_bad={arguments.max_bad}; the last is {missing[-1]}; nothing was packed"
        )
    return selection.clips
