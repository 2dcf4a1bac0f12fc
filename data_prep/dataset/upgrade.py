"""Converts the index of a data set of format 2 to this format, without reading its samples.

Format 2 has compressed columns in `samples.npz`. The new file of rows is written first, then
`manifest.json`, then the old columns are removed. An interrupted upgrade is repeated: until the new
`manifest.json` is in place, the data set is one of format 2, and whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields

import numpy as np
from fsspec.core import url_to_fs

from tvr.data_prep.dataset.index_rules import IndexFields, generation_of
from tvr.data_prep.dataset.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    UPGRADED_VERSION,
    Manifest,
    join_url,
    parse_manifest,
    read_at_most,
    read_manifest,
    read_manifest_json,
    write_manifest,
)
from tvr.data_prep.dataset.npz_columns import MAX_COLUMNS_BYTES, check_columns, read_columns
from tvr.data_prep.dataset.sample_table import SampleTable, text_array
from tvr.data_prep.records import ShardCorrupt


def upgrade_dataset(url: str) -> bool:
    """Converts a data set to the present format. Keys, order and samples stay the same.

    Args:
        url: Folder path or fsspec URL of the data set.

    Returns:
        False if the data set already has the present format.

    Raises:
        FileNotFoundError: there is no complete data set at `url`.
        OSError: the storage fails.
        ValueError: the data set has a version that cannot be upgraded.
        ShardCorrupt: the index is damaged, or a value is not allowed.
    """
    values = read_manifest_json(url)
    version = values.get("format_version")
    generation = generation_of(values, url)
    is_old = version == UPGRADED_VERSION
    if is_old:
        manifest = parse_manifest(values, url)
        columns = _old_columns(url, manifest, IndexFields(values, join_url(url, MANIFEST_NAME)))
        write_manifest(url, manifest, _rows(manifest, columns))
    elif version != FORMAT_VERSION:
        raise ValueError(
            f"{join_url(url, MANIFEST_NAME)}: format_version={version!r}, tvr upgrade converts"
            f" {UPGRADED_VERSION} to {FORMAT_VERSION}; pack the data set again"
        )
    read_manifest(url)  # the old columns go only if the new ones can be opened
    fs, root = url_to_fs(url)
    with suppress(FileNotFoundError):  # of this upgrade, or of an interrupted one
        fs.rm_file(join_url(root, _old_name(generation)))
    return is_old


def _old_name(generation: int) -> str:
    return "samples.npz" if not generation else f"samples-{generation}.npz"


def _old_columns(url: str, manifest: Manifest, index: IndexFields) -> dict[str, np.ndarray]:
    """Reads and checks the columns of a data set of format 2."""
    entry = index.child("samples")
    name, sha256 = entry.file_name("name", ".npz"), entry.sha256("sha256")
    where = join_url(url, name)
    try:
        content = read_at_most(url, name, MAX_COLUMNS_BYTES)
    except FileNotFoundError as error:
        raise ShardCorrupt(f"{where} is missing although {MANIFEST_NAME} is there") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ShardCorrupt(f"{where}: sha256 differs from the one in {MANIFEST_NAME}")
    columns = read_columns(content, manifest.num_samples, where)
    shards = range(len(manifest.shards))
    file_bytes = np.array([manifest.file_of_shard(shard).shard_bytes for shard in shards])
    check_columns(columns, file_bytes, is_tar=manifest.beton is None, where=where)
    if not np.array_equal(columns["shard"], np.repeat(shards, manifest.shard_sizes)):
        raise ShardCorrupt(
            f"{url}: {MANIFEST_NAME} and the columns disagree on the samples per shard"
        )
    return columns


def _rows(manifest: Manifest, columns: dict[str, np.ndarray]) -> Iterator[SampleTable]:
    for shard in range(len(manifest.shards)):
        start, stop = manifest.row_starts[shard : shard + 2].tolist()
        rows = {each.name: columns[each.name][start:stop] for each in fields(SampleTable)}
        texts = {name: text_array(rows[name].tolist()) for name in ("key", "video_id")}
        yield SampleTable(**(rows | texts))
