"""Real loaders of several nodes that read one data set over HTTP, counted at the store."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from builders.batches import training
from builders.http_store import HttpStorage, serve_folder
from builders.raw_shards import write_raw_shards
from PIL import Image

from tvr.data_prep.dataset.manifest import Manifest, read_manifest
from tvr.data_prep.dataset.shard_writer import TarSample, tar_bytes
from tvr.data_prep.reading.cache_folder import ShardFolder
from tvr.data_prep.reading.node_cache import CacheFolder
from tvr.data_prep.reading.order import SampleOrder, window_shards
from tvr.data_prep.reading.prefetch import THREAD_NAME

SEED = 7
QUIET_S = 0.4


@dataclass(frozen=True, kw_only=True)
class NodesRun:
    """Ranks on nodes, each node with its own cache folder and its own way to the store."""

    ranks: int
    ranks_per_node: int
    micro_batch: int
    accumulation: int = 1
    """Micro-steps a step."""
    workers: int = 0
    cache_bytes: int | None
    windows: int
    """Windows of the first epoch to read, all of them whole."""
    step_s: float = 0.0
    """Pause after a micro-step."""
    latency_s: float = 0.0
    node_bytes_per_s: float | None = None
    at_once: bool = False
    """All ranks read at the same time, as in a run, instead of in turn."""

    @property
    def global_batch(self) -> int:
        return self.ranks * self.micro_batch * self.accumulation


@dataclass(kw_only=True)
class Measured:
    """What a run asked of the store for the shards of its windows."""

    requests: int = 0
    num_bytes: int = 0
    downloads: int = 0
    """Whole shards."""
    cache_peak_bytes: int = 0
    """Of the node with the largest."""
    first_batch_s: float = 0.0
    waited_s: float = 0.0
    """For all batches but the first, without the pauses."""


def write_clips_of_many_sizes(folder: Path, shards: int, per_shard: int) -> str:
    """Writes shards of one-frame clips of 2 to 20 kB; returns the path."""
    picture = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 99, np.uint8)).save(picture, "jpeg")
    rng = np.random.Generator(np.random.Philox(1))
    written = []
    for shard in range(shards):
        samples = []
        for sample in range(per_shard):
            key = f"c{shard:03d}{sample:03d}"
            caption = "word " * int(rng.integers(10, 3500))
            meta = {"captions": [caption], "video_id": key, "frame_times_s": [0.0]}
            members = {"json": json.dumps(meta).encode(), "00.jpg": picture.getvalue()}
            stored = tar_bytes(key, members)
            row = shard * per_shard + sample
            samples.append(
                TarSample(key=key, video_id=key, stored=stored, num_captions=1, content=row)
            )
        written.append(samples)
    return write_raw_shards(folder, written, layout="frames", num_frames=1)


def measure_nodes(folder: Path, scratch: Path, run: NodesRun) -> Measured:
    """Reads the windows with all ranks, and counts."""
    manifest = read_manifest(str(folder))
    sizes = manifest.shard_sizes
    order = SampleOrder(sizes, SEED, window_shards(run.global_batch, len(sizes)))
    window, shards = order.window_at(0), set[int]()
    for _ in range(run.windows):
        shards |= set(window.shards.tolist())
        end, window = window.end, order.next_window(window)
    micro_steps = -(-end // (run.ranks * run.micro_batch))
    starts = range(0, run.ranks, run.ranks_per_node)
    nodes = [range(start, min(start + run.ranks_per_node, run.ranks)) for start in starts]
    measured = Measured()
    with ExitStack() as stack:
        stores = [
            stack.enter_context(_served(folder, manifest, run, shards, measured)) for _ in nodes
        ]
        peaks = stack.enter_context(_cache_peaks())
        ranks = []
        for number, (store, node) in enumerate(zip(stores, nodes, strict=True)):
            cache = None
            if run.cache_bytes is not None:
                path = scratch / f"node{number}"
                cache = CacheFolder(path=str(path), max_bytes=run.cache_bytes)
            for rank in node:
                batches: Any = training(
                    store.url,
                    seed=SEED,
                    rank=rank,
                    world_size=run.ranks,
                    node=node,
                    micro_batch=run.micro_batch,
                    global_batch=run.global_batch,
                    workers=run.workers,
                    num_frames=1,
                    shard_cache=cache,
                )
                ranks.append(stack.enter_context(closing(batches)))
        read_all: Any = map
        if run.at_once:
            read_all = stack.enter_context(ThreadPoolExecutor(len(ranks))).map
        for step in range(micro_steps):
            began = time.monotonic()
            list(read_all(next, ranks))
            waited = time.monotonic() - began
            if step:
                measured.waited_s += waited
            else:
                measured.first_batch_s = waited
            time.sleep(run.step_s)
        for thread in threading.enumerate():
            if thread.name == THREAD_NAME:
                thread.join()
        slowest_s = 0.0
        if run.node_bytes_per_s is not None:
            largest = max(shard.shard_bytes for shard in manifest.shards)
            # The link serves the prefetch threads of all workers of a node in turn.
            workers = run.ranks_per_node * max(run.workers, 1)
            slowest_s = workers * largest / run.node_bytes_per_s
        _wait_until_quiet(stores, QUIET_S + slowest_s)
        lines = [line for number in range(len(nodes)) for line in peaks(scratch / f"node{number}")]
        measured.cache_peak_bytes = max(map(int, lines), default=0)
    return measured


def _wait_until_quiet(stores: Sequence[HttpStorage], seconds: float) -> None:
    """Waits until workers have read and downloaded all that they do in advance.

    Nothing is requested for so many seconds only if nothing is left to request.
    """
    before = -1
    while before != (count := sum(len(store.requests) for store in stores)):
        before = count
        time.sleep(seconds)


@contextmanager
def _served(
    folder: Path, manifest: Manifest, run: NodesRun, shards: set[int], measured: Measured
) -> Iterator[HttpStorage]:
    """Serves the data set to one node; counts requests for `shards`."""
    sizes = {manifest.shards[shard].name: manifest.shards[shard].shard_bytes for shard in shards}
    link = threading.Lock()
    counting = threading.Lock()
    with serve_folder(folder) as store:
        answer = store.answer

        def counted(name: str, byte_range: str | None) -> tuple[int, bytes]:
            time.sleep(run.latency_s)
            status, content = answer(name, byte_range)
            if run.node_bytes_per_s is not None:
                with link:
                    time.sleep(len(content) / run.node_bytes_per_s)
            if name in sizes:
                assert status == 206
                with counting:
                    measured.requests += 1
                    measured.num_bytes += len(content)
                    # A sample is smaller than a shard, and its range starts with the sample.
                    last = int(re.findall(r"\d+", byte_range or "")[1]) + 1
                    measured.downloads += last == sizes[name]
            return status, content

        store.answer = counted  # type: ignore[method-assign]
        yield store


def _size(path: Path) -> int:
    """0 for a file that another process has renamed or removed meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@contextmanager
def _cache_peaks() -> Iterator[Any]:
    """Notes the bytes in a cache folder after each reservation, in workers too."""
    reserve = ShardFolder.reserve

    def noted(folder: ShardFolder, *arguments: Any) -> bool:
        reserved = reserve(folder, *arguments)
        used = sum(map(_size, folder.path.glob("*.tar")))
        used += sum(map(_size, folder.path.glob("*.partial")))
        with Path(f"{folder.path}.peaks").open("a") as file:
            file.write(f"{used}\n")
        return reserved

    def peaks(folder: Path) -> list[str]:
        file = Path(f"{folder}.peaks")
        return file.read_text().split() if file.exists() else []

    with patch.object(ShardFolder, "reserve", noted):
        yield peaks
