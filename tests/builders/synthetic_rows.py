"""Indexes of data sets of any size, without the samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
from fsspec.core import url_to_fs

from tvr.data_prep.dataset.manifest import Manifest, Shard, shard_name, write_manifest
from tvr.data_prep.dataset.sample_table import SampleTable, concat_samples, text_array

SHARD_ROWS = 1000
SAMPLE_BYTES = 1 << 14


def write_synthetic(
    folder: str | os.PathLike[str],
    num_rows: int,
    *,
    shard_rows: int = SHARD_ROWS,
    video_id: Callable[[int], str] = lambda row: f"video-{row:07d}",
) -> str:
    """Writes the index of a data set whose row 7 has the key clip-0000007; returns its URL."""
    url = str(folder)
    fs, root = url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    sizes = [min(shard_rows, num_rows - start) for start in range(0, num_rows, shard_rows)]
    shards = tuple(
        Shard(
            name=shard_name(number, 0),
            num_samples=size,
            shard_bytes=size * SAMPLE_BYTES + 1024,
            sha256=f"{number:064x}",
        )
        for number, size in enumerate(sizes)
    )
    manifest = Manifest(
        layout="frames",
        num_frames=4,
        short_side=None,
        num_captions=num_rows,
        num_empty_captions=0,
        bad={},
        shards=shards,
        samples=concat_samples([]),
    )

    def parts() -> Iterator[SampleTable]:
        start = 0
        for size in sizes:
            yield _rows(start, size, video_id)
            start += size

    write_manifest(url, manifest, parts())
    return url


def _rows(start: int, size: int, video_id: Callable[[int], str]) -> SampleTable:
    rows = np.arange(start, start + size)
    return SampleTable(
        key=text_array([f"clip-{row:07d}" for row in rows.tolist()]),
        video_id=text_array([video_id(row) for row in rows.tolist()]),
        shard=np.zeros(size, dtype=np.int32),
        offset=np.arange(size, dtype=np.int64) * SAMPLE_BYTES,
        length=np.full(size, SAMPLE_BYTES, dtype=np.int64),
        crc32=rows.astype(np.uint32),
        num_captions=np.ones(size, dtype=np.int32),
        content=rows.astype(np.uint64),
    )
