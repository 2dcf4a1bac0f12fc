"""Converts a data set of shards in the frames layout to a beton, FFCV's single-file format.

The folder of the beton contains the index of the source data set, so that the sample order is the
same; byte ranges and checksums refer to the `.beton` file. A sample's byte range can be read
without FFCV, see `dataset.jpeg_stack`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from tvr.data_prep.dataset.index_rules import generation_of
from tvr.data_prep.dataset.jpeg_stack import stack_bytes
from tvr.data_prep.dataset.manifest import (
    BAD_NAME,
    MANIFEST_NAME,
    Manifest,
    Shard,
    read_manifest,
    read_manifest_json,
    samples_name,
    write_manifest,
)
from tvr.data_prep.dataset.sample_codec import parse_meta
from tvr.data_prep.ffcv.optional_import import import_ffcv
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.storage.storage import Storage

PARTIAL = "writing.beton.partial"
# FFCV's page size is a power of two and at least 2 MiB; a sample must fit into one page.
PAGE_BYTES = 1 << 23
MAX_PAGE_BYTES = 1 << 31

OnSample = Callable[[int, int], None]
"""Called with the number of samples written so far and the total."""


def write_beton(
    source: str, url: str, *, overwrite: bool = False, on_progress: OnSample | None = None
) -> Manifest:
    """Converts the data set at `source` to a beton in a local folder.

    JPEG bytes are copied without re-encoding, and checked. The file has a temporary name until it
    is complete; `manifest.json` is written last.

    Args:
        source: Folder or fsspec URL of a data set of shards in the frames layout.
        url: Local folder to write.
        overwrite: Replace a complete beton at `url`.
        on_progress: Called after each sample.

    Returns:
        The manifest of the new data set.

    Raises:
        BadSample: the source contains one; leaving it out would change the sample order.
        FileExistsError: `url` holds a complete beton and `overwrite` is false, or it holds another
            data set.
        ImportError: FFCV is not installed.
        ValueError: the source is not a data set of shards in the frames layout, `url` is remote, or
            a sample exceeds FFCV's page size.
    """
    import_ffcv(f"writing a beton to {url}")
    store = Storage(url)
    if not store.is_local:
        raise ValueError(f"{url}: a beton is mapped into memory, so it must be a local folder")
    folder = Path(store.path(""))
    generation = _next_generation(url, folder, overwrite)
    reader = SampleReader(source, num_frames=1, image_size=1)
    if reader.manifest.layout != "frames" or reader.manifest.beton:
        kind = "a beton" if reader.manifest.beton else f"layout {reader.manifest.layout}"
        raise ValueError(
            f"{source} is {kind}; a beton needs a source of shards in the layout frames"
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / PARTIAL
    try:
        ranges = _write_file(partial, reader, on_progress or (lambda done, total: None))
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # Named by content, so that the file being replaced stays until the new index is published.
        beton = Shard(
            name=f"{digest[:16]}.beton",
            num_samples=len(reader),
            shard_bytes=partial.stat().st_size,
            sha256=digest,
        )
        manifest = replace(
            reader.manifest,
            generation=generation,
            beton=beton,
            samples=replace(reader.manifest.samples, **ranges),
        )
        os.replace(partial, folder / beton.name)
        (folder / BAD_NAME).write_bytes(Storage(source).read(BAD_NAME))
        write_manifest(url, manifest)
    finally:
        partial.unlink(missing_ok=True)
    for pattern in ("*.beton", "samples*.rows", "samples*.npz"):
        for path in folder.glob(pattern):
            if path.name not in (beton.name, samples_name(generation)):
                path.unlink()  # belongs to the replaced beton
    return read_manifest(url)


def _next_generation(url: str, folder: Path, overwrite: bool) -> int:
    if not (folder / MANIFEST_NAME).exists():
        return 0
    fields = read_manifest_json(url)
    if not overwrite or not fields.get("beton"):
        hint = " or pass --overwrite" if fields.get("beton") else ""
        kind = "beton" if fields.get("beton") else "data set of shards"
        raise FileExistsError(f"{url} holds a complete {kind}; choose another folder{hint}")
    return generation_of(fields, url) + 1


def _write_file(path: Path, reader: SampleReader, on_progress: OnSample) -> dict[str, np.ndarray]:
    """Writes the `.beton` file; returns its columns offset, length and crc32."""
    from ffcv.fields import BytesField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, handle_sample

    from tvr.data_prep.ffcv.field import JpegStackField

    fields = {"frames": JpegStackField(), "text": BytesField()}
    page_bytes = _page_bytes(reader)
    # Not `DatasetWriter.from_indexed_dataset`, which never returns if one of its processes fails.
    writer: Any = DatasetWriter(str(path), fields, page_size=page_bytes, num_workers=1)
    writer.num_samples = len(reader)
    writer.prepare()
    allocator = MemoryAllocator(str(path), writer.data_region_start, page_bytes)
    metadata = np.frombuffer(writer.metadata_sm.buf, dtype=writer.metadata_type)
    crc32 = np.zeros(len(reader), dtype=np.uint32)
    try:
        with allocator:
            for row, (sample, checksum) in enumerate(_samples(reader)):
                handle_sample(sample, row, metadata.dtype.names, metadata, allocator, fields)
                crc32[row] = checksum
                on_progress(row + 1, len(reader))
        writer.finalize(allocator.allocations)
    finally:
        del metadata  # otherwise the shared memory cannot be closed
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
    # For each sample and field: (sample, offset, size).
    ranges = np.array(allocator.allocations, dtype=np.int64).reshape(len(reader), 2, 3)
    return {"offset": ranges[:, 0, 1], "length": ranges[:, :, 2].sum(axis=1), "crc32": crc32}


def _page_bytes(reader: SampleReader) -> int:
    # An upper bound: in a shard, a sample's members have tar headers as well.
    largest = int(reader.manifest.samples.length.max())
    page_bytes = max(PAGE_BYTES, 1 << (largest - 1).bit_length())
    if page_bytes > MAX_PAGE_BYTES:
        key = reader.key(int(reader.manifest.samples.length.argmax()))
        raise ValueError(f"sample {key}: {largest} bytes; FFCV allows at most {MAX_PAGE_BYTES}")
    return page_bytes


def _samples(reader: SampleReader) -> Iterator[tuple[Any, int]]:
    """Yields each sample's field values and their crc32."""
    for row in range(len(reader)):
        key, members = reader.key(row), reader.members(row)
        jpegs = [members[name] for name in parse_meta(key, members).jpegs]
        text = members["json"]
        height, width = _common_size(jpegs)
        crc32 = zlib.crc32(text, zlib.crc32(stack_bytes(jpegs)))
        yield ((jpegs, height, width), np.frombuffer(text, dtype=np.uint8)), crc32


def _common_size(jpegs: list[bytes]) -> tuple[int, int]:
    """Common (height, width) of all frames.

    Returns (0, 0) if there is none; training then treats the sample as bad.
    """
    try:
        sizes = {tuple(map(int, simplejpeg.decode_jpeg_header(jpeg)[:2])) for jpeg in jpegs}
    except ValueError:
        return 0, 0
    height, width = sizes.pop() if len(sizes) == 1 else (0, 0)
    return height, width
