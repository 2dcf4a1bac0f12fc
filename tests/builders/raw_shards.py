"""Data sets written sample by sample, without the checks of `pack_shards`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from tvr.data_prep.dataset.manifest import (
    Layout,
    Manifest,
    concat_samples,
    shard_name,
    write_manifest,
)
from tvr.data_prep.dataset.shard_writer import ShardWriter, TarSample


def write_raw_shards(
    folder: Path, shards: Sequence[Sequence[TarSample]], *, layout: Layout, num_frames: int
) -> str:
    """Writes shards of these samples and their manifest; returns the URL."""
    folder.mkdir()
    written = []
    for number, samples in enumerate(shards):
        name = shard_name(number, 0)
        writer = ShardWriter(LocalFileSystem(), str(folder / name))
        for sample in samples:
            writer.append(sample)
        written.append(writer.finish(name))
    table = concat_samples([rows for _, rows in written])
    manifest = Manifest(
        layout=layout,
        num_frames=num_frames,
        short_side=None,
        num_captions=int(table.num_captions.sum()),
        num_empty_captions=0,
        bad={},
        shards=tuple(shard for shard, _ in written),
        samples=table,
    )
    write_manifest(str(folder), manifest)
    return str(folder)
