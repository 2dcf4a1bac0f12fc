"""Measures clips a second of each source of training batches against plain webdataset.

The sources take turns within one process, so that other load of the machine affects all of them
alike. "Plain" is what a user of webdataset would write: the same shards, decoded by Pillow (JPEG)
or PyAV (MP4), stacked, batched, through WebLoader.
"""

from __future__ import annotations

import gc
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from webdataset.compat import WebDataset, WebLoader

from tvr.data_prep.dataset.manifest import Layout, read_manifest, write_manifest
from tvr.data_prep.dataset.shard_writer import ShardWriter, TarSample, tar_bytes
from tvr.data_prep.ffcv.writer import write_beton
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.reading.loader import train_batches
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import Caption, Clip
from tvr.data_prep.video.frame_sampling import segment_centres
from tvr.data_prep.video.stored_index import INDEX_MEMBER

SOURCES = ("plain jpeg", "frames", "beton", "plain mp4", "unindexed", "video", "reencoded")
PLAIN = {
    "frames": "plain jpeg",
    "beton": "plain jpeg",
    "unindexed": "plain mp4",
    "video": "plain mp4",
    "reencoded": "plain mp4",
}
"""The plain source that each source is compared with."""
STEPS = (1, 10, 1_000_000)
"""Steps at which the time to the first batch is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataBenchSizes:
    """Sizes of the clips and of the measurement."""

    clips: int
    frames: int
    size: int
    """Height and width in pixels of clips, and of frames in a batch."""
    clip_frames: int = 64
    """Frames of a clip's video."""
    keyframe_interval: int = 250
    """Most frames from one keyframe of a clip's video to the next."""
    batch: int
    workers: int
    epochs: int
    """Epochs in one measurement."""
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Measured speed of one source."""

    source: str
    clips_per_s: tuple[float, ...]
    """Clips a second of each repeat."""
    first_batch_s: dict[int, float]
    """Median seconds from the call to the first batch, by start step. Plain webdataset starts at
    step 1 only."""

    @property
    def median(self) -> float:
        return median(self.clips_per_s)


def measure(
    folder: Path, sizes: DataBenchSizes, sources: Sequence[str], report: Callable[[str], None]
) -> list[Speed]:
    """Renders and packs the clips in `folder`, then measures the sources in turn.

    Args:
        report: Called with the name of each source that is about to be measured.
    """
    make_data(folder, sizes, sources)
    steps = {source: (1,) if source.startswith("plain") else STEPS for source in sources}
    rates: dict[str, list[float]] = {source: [] for source in sources}
    starts: dict[str, dict[int, list[float]]] = {s: {k: [] for k in steps[s]} for s in sources}
    for repeat in range(sizes.repeats + 1):  # the first repeat warms up caches and compilers
        for source in sources:
            report(source)
            rate = _rate(folder, sizes, source)
            waits = {step: _first_batch_s(folder, sizes, source, step) for step in steps[source]}
            if repeat:
                rates[source].append(rate)
                for step, wait in waits.items():
                    starts[source][step].append(wait)
    return [
        Speed(
            source=source,
            clips_per_s=tuple(rates[source]),
            first_batch_s={step: median(waits) for step, waits in starts[source].items()},
        )
        for source in sources
    ]


def make_data(folder: Path, sizes: DataBenchSizes, sources: Sequence[str]) -> None:
    """Renders clips of a moving pattern with noise, and packs them for each source."""
    videos = folder / "clips"
    videos.mkdir(parents=True)
    clips = []
    for number in range(sizes.clips):
        path = videos / f"c{number:04d}.mp4"
        write_clip(path, number, sizes)
        captions = (f"pattern {number} moves",)
        clips.append(Clip(key=path.stem, video=str(path), captions=captions, video_id=path.stem))
    shape: dict[str, Any] = {
        "num_frames": sizes.frames,
        "samples_per_shard": max(1, sizes.clips // (2 * max(1, sizes.workers))),
    }
    used: dict[Layout, set[str]] = {
        "frames": {"plain jpeg", "frames", "beton"},
        "video": {"plain mp4", "video", "unindexed"},
    }
    for layout, names in used.items():
        if names & set(sources):
            pack_shards(clips, str(folder / layout), layout=layout, **shape)
    if "reencoded" in sources:
        pack_shards(clips, str(folder / "reencoded"), layout="video", reencode=True, **shape)
    if "unindexed" in sources:
        _write_without_index(str(folder / "video"), folder / "unindexed")
    if "beton" in sources:
        write_beton(str(folder / "frames"), str(folder / "beton"))


def _write_without_index(url: str, folder: Path) -> None:
    """Copies a data set without the frame indexes of its videos, as earlier releases packed it."""
    reader = SampleReader(url, num_frames=1, image_size=1)
    manifest, fs, written = reader.manifest, LocalFileSystem(), []
    folder.mkdir()
    for number, shard in enumerate(manifest.shards):
        writer = ShardWriter(fs, str(folder / shard.name))
        for row in manifest.rows_of_file(number):
            members = reader.members(row)
            del members[INDEX_MEMBER]
            sample = TarSample(
                key=reader.key(row),
                video_id=manifest.samples.video_id[row],
                stored=tar_bytes(reader.key(row), members),
                num_captions=int(manifest.samples.num_captions[row]),
                content=int(manifest.samples.content[row]),
            )
            writer.append(sample)
        written.append(writer.finish(shard.name))
    shards = tuple(shard for shard, _ in written)
    write_manifest(str(folder), replace(manifest, shards=shards), [rows for _, rows in written])


def write_clip(
    path: Path, number: int, sizes: DataBenchSizes, *, options: dict[str, str] | None = None
) -> None:
    """Renders a clip; `options` are further ones of libx264."""
    noise = np.random.default_rng(number).normal(0, 10, (sizes.size, sizes.size, 3))
    y, x = np.mgrid[: sizes.size, : sizes.size]
    with av.open(str(path), "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width = stream.height = sizes.size
        stream.pix_fmt = "yuv420p"
        defaults = {"preset": "veryfast", "g": str(sizes.keyframe_interval)}
        stream.options = defaults | (options or {})
        for index in range(sizes.clip_frames):
            waves = (
                np.sin(x / 17 + index / 5 + number),
                np.cos(y / 19 + index / 7),
                np.sin((x + y) / 23),
            )
            picture = np.clip(128 + 80 * np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def _rate(folder: Path, sizes: DataBenchSizes, source: str) -> float:
    """Clips a second over some epochs, after the prefetched batches."""
    num_batches = max(1, sizes.epochs * sizes.clips // sizes.batch)
    prefetched = 2 * max(1, sizes.workers) + 1
    with _closed(_batches(folder, sizes, source, step=1)) as batches:
        for _ in range(prefetched):
            next(batches)
        start = time.perf_counter()
        for _ in range(num_batches):
            next(batches)
        return num_batches * sizes.batch / (time.perf_counter() - start)


def _first_batch_s(folder: Path, sizes: DataBenchSizes, source: str, step: int) -> float:
    start = time.perf_counter()
    with _closed(_batches(folder, sizes, source, step)) as batches:
        next(batches)
        return time.perf_counter() - start


def _closed(batches: Iterator[Any]) -> Any:
    gc.collect()  # ends the worker processes of the previous source
    close = getattr(batches, "close", None)
    return nullcontext(batches) if close is None else closing(batches)  # type: ignore[type-var]


def _batches(folder: Path, sizes: DataBenchSizes, source: str, step: int) -> Iterator[Any]:
    if source == "plain jpeg":
        return _plain(folder / "frames", sizes, _from_jpegs, "pil")
    if source == "plain mp4":
        return _plain(folder / "video", sizes, lambda sample: _from_mp4(sample, sizes.frames))
    return train_batches(
        str(folder / source),
        seed=0,
        global_batch=sizes.batch,
        micro_batch=sizes.batch,
        rank=0,
        world_size=1,
        start_step=step,
        workers=sizes.workers,
        num_frames=sizes.frames,
        image_size=sizes.size,
        tokenize=_tokenize,
        max_bad=0,
    )


def _plain(
    folder: Path, sizes: DataBenchSizes, clip: Callable[[dict], Any], *decoders: str
) -> Iterator[Any]:
    shards = [str(folder / shard.name) for shard in read_manifest(str(folder)).shards]
    pipeline: Any = WebDataset(shards, shardshuffle=len(shards)).shuffle(sizes.batch)
    pipeline = pipeline.decode(*decoders).map(clip).batched(sizes.batch, partial=False).repeat()
    return iter(WebLoader(pipeline, batch_size=None, num_workers=sizes.workers))


def _from_jpegs(sample: dict) -> tuple[torch.Tensor, str, str]:
    pictures = [np.asarray(sample[name]) for name in sorted(sample) if name.endswith(".jpg")]
    return _frames(pictures), sample["json"]["captions"][0], sample["__key__"]


def _from_mp4(sample: dict, num_frames: int) -> tuple[torch.Tensor, str, str]:
    with av.open(io.BytesIO(sample["mp4"]), "r") as container:
        frames = list(container.decode(video=0))
    chosen = segment_centres(len(frames), num_frames)
    pictures = [frames[index].to_ndarray(format="rgb24") for index in chosen]
    return _frames(pictures), sample["json"]["captions"][0], sample["__key__"]


def _frames(pictures: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _tokenize(captions: Sequence[Caption]) -> tuple[torch.Tensor, torch.Tensor]:
    # The plain sources have no tokeniser, so none is timed here.
    ones = torch.ones(len(captions), 1, dtype=torch.long)
    return ones, ones
