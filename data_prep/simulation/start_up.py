"""What a data set's index costs at a start: bytes from the store, seconds, and memory.

Each rank reads `manifest.json`. The file of rows is downloaded and verified once a node, and mapped
by all its processes.
"""

from __future__ import annotations

import hashlib
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from fsspec.core import url_to_fs

from tvr.data_prep.dataset.index_rules import TAR_BLOCK
from tvr.data_prep.dataset.manifest import (
    MANIFEST_NAME,
    PIECE_BYTES,
    Manifest,
    Shard,
    join_url,
    read_manifest,
    samples_name,
    shard_name,
    write_manifest,
)
from tvr.data_prep.dataset.sample_table import SampleTable

# Rows of the index that stands for a larger one.
MEASURED_ROWS = 40_000
MEASURED_REPEATS = 3
HASHED_BYTES = 1 << 24
# A tar archive ends with two empty blocks, filled up to a record of 20 blocks.
END_BYTES = 20 * TAR_BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexCost:
    """Cost of an index: a part for each reading by a process, and a part for each node."""

    manifest_bytes: int
    """Of `manifest.json`, which each process reads."""
    rows_bytes: int
    """Of the file of rows, which a node downloads once and its processes map."""
    open_s: float
    """Seconds to open both from a local disk, on this machine."""
    verify_s: float
    """Seconds to hash the file of rows, on this machine."""
    memory_bytes: int
    """Memory of a process that has opened it, without the mapped file."""
    measured_rows: int
    """Rows of the index that was opened; the cost of the others is extrapolated."""

    @property
    def manifest_requests(self) -> int:
        """Requests of one process; a piece that is not full ends the file."""
        return self.manifest_bytes // PIECE_BYTES + 1

    @property
    def rows_requests(self) -> int:
        """Requests of a node: the header, the table, then all bytes in pieces."""
        return 2 - (-self.rows_bytes // PIECE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCall:
    """Cost of one call on this machine."""

    seconds: float
    held_bytes: int
    """Memory that is in use after the call."""
    peak_bytes: int


def measure(call: Callable[[], Any], *, repeats: int = 1) -> tuple[Any, MeasuredCall]:
    """Calls a function for its time, the shortest of `repeats`, and once more for its memory.

    Returns:
        The result of the last call, and the cost.
    """
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    seconds = min(times)
    is_traced = tracemalloc.is_tracing()
    if not is_traced:
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        result = call()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        if not is_traced:
            tracemalloc.stop()
    return result, MeasuredCall(
        seconds=seconds, held_bytes=max(held - before, 0), peak_bytes=max(peak - before, 0)
    )


def index_cost(url: str) -> tuple[Manifest, IndexCost]:
    """Reads the index of a data set and measures that.

    Raises:
        OSError, ValueError, ShardCorrupt: see `read_manifest`.
    """
    manifest = read_manifest(url)  # which downloads the rows of a remote data set
    manifest, cost = measure(lambda: read_manifest(url))
    fs, root = url_to_fs(url)
    names = (MANIFEST_NAME, samples_name(manifest.generation))
    sizes = [float(fs.size(join_url(root, name))) for name in names]
    return manifest, _index_cost(sizes, cost.seconds, cost.held_bytes, manifest.num_samples)


def described_index_cost(num_samples: int, samples_per_shard: int, clip_bytes: int) -> IndexCost:
    """Measures two indexes of a few rows of a described data set and extrapolates to all rows."""
    many = min(num_samples, MEASURED_ROWS)
    values = _measured(many, samples_per_shard, clip_bytes)
    if many < num_samples:
        few = many // 4
        at_few = _measured(few, samples_per_shard, clip_bytes)
        each = np.maximum(values - at_few, 0) / (many - few)
        values = values + each * (num_samples - many)
    *sizes, seconds, memory = values.tolist()
    return _index_cost(sizes, seconds, memory, many)


def _measured(num_samples: int, samples_per_shard: int, clip_bytes: int) -> np.ndarray:
    """The sizes of an index's two files, the seconds to open it, and the memory that it takes."""
    with TemporaryDirectory(prefix="tvr-simulate-") as folder:
        write_manifest(folder, _described_manifest(num_samples, samples_per_shard, clip_bytes))
        _, cost = measure(lambda: read_manifest(folder), repeats=MEASURED_REPEATS)
        names = (MANIFEST_NAME, samples_name(0))
        sizes = [(Path(folder) / name).stat().st_size for name in names]
    return np.array([*sizes, cost.seconds, cost.held_bytes], dtype=np.float64)


def _index_cost(
    sizes: list[float], open_s: float, memory_bytes: float, measured_rows: int
) -> IndexCost:
    content = bytes(HASHED_BYTES)
    began = time.perf_counter()
    hashlib.sha256(content)
    second_per_byte = (time.perf_counter() - began) / len(content)
    manifest_bytes, rows_bytes = map(round, sizes)
    return IndexCost(
        manifest_bytes=manifest_bytes,
        rows_bytes=rows_bytes,
        open_s=open_s,
        verify_s=rows_bytes * second_per_byte,
        memory_bytes=round(memory_bytes),
        measured_rows=measured_rows,
    )


def described_shard(number: int, num_samples: int, clip_bytes: int) -> Shard:
    """A shard of clips of equal sizes, multiples of a tar archive's blocks."""
    return Shard(
        name=shard_name(number, 0),
        num_samples=num_samples,
        shard_bytes=num_samples * clip_bytes + END_BYTES,
        sha256=f"{number:064x}",
    )


def _described_manifest(num_samples: int, samples_per_shard: int, clip_bytes: int) -> Manifest:
    """An index with keys of 11 characters, and random numbers where a real one has hashes."""
    random = np.random.Generator(np.random.Philox(0))
    rows = np.arange(num_samples)
    shards, within = np.divmod(rows, samples_per_shard)
    length = -(-clip_bytes // TAR_BLOCK) * TAR_BLOCK
    keys = np.array([f"clip{row:07d}" for row in rows])
    table = SampleTable(
        key=keys,
        video_id=keys,
        shard=shards.astype(np.int32),
        offset=within * length,
        length=np.full(num_samples, length),
        crc32=random.integers(2**32, size=num_samples, dtype=np.uint32),
        num_captions=np.ones(num_samples, dtype=np.int32),
        content=random.integers(2**64, size=num_samples, dtype=np.uint64),
    )
    counts = np.bincount(shards)
    return Manifest(
        layout="frames",
        num_frames=1,
        short_side=None,
        num_captions=num_samples,
        num_empty_captions=0,
        bad={},
        shards=tuple(
            described_shard(number, count, length) for number, count in enumerate(counts.tolist())
        ),
        samples=table,
    )
