"""What the files of an index hold, and what their fields may say.

    FEATURES/index/index.json                       all segments; written last
    FEATURES/index/centroids.bin                    of ivf: the centres of its lists
    FEATURES/index/SET/segment-FIRST/segment.json   the record of one segment
    FEATURES/index/SET/segment-FIRST/NAME.bin       one array, little-endian, without a header

No file is in a format of FAISS: its readers trust what they read. Arrays are checked here and in
`graph`, and FAISS gets them from memory. An index may come from anyone, so each field has a type
and a range, and is checked before anything is done with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from tvr.data_prep.records import ShardCorrupt
from tvr.trainer.features.stored_file import STRICT, Sha256, StoredFile, check_file

FOLDER, MANIFEST, SEGMENT, CENTROIDS = "index", "index.json", "segment.json", "centroids.bin"
FORMAT, VERSION = "tvr-index", 1
Method = Literal["exact", "ivf", "hnsw"]
MAX_JSON_BYTES = 1 << 26
MAX_ROWS = 1 << 32
BUILD_AGAIN = "build the index again"

Count = Annotated[int, Field(ge=0, le=MAX_ROWS)]


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class IndexHeader:
    """What all segments of an index have in common."""

    format: Literal["tvr-index"] = FORMAT
    version: Literal[1] = VERSION
    method: Method
    fingerprint: Sha256
    """Of the model that encoded the features."""
    width: Annotated[int, Field(ge=1, le=1 << 16)]
    blocks_per_segment: Annotated[int, Field(ge=1, le=1 << 20)]
    num_lists: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    """Lists of ivf; 0 for the other methods."""
    neighbours: Annotated[int, Field(ge=0, le=256)] = 0
    """Edges of a node of hnsw, twice as many at the bottom; 0 for the other methods."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Segment:
    """Consecutive blocks of one data set of the features."""

    source: Annotated[str, Field(pattern=r"^set-[0-9a-f]{16}$", max_length=20)]
    """Name of the data set's folder."""
    first_block: Count
    end_block: Count
    videos: Count
    features: Sha256
    """Of the hashes of the features that it was built from."""
    centroids: Sha256 | None
    files: Mapping[Literal["vectors", "lists", "levels", "neighbours", "entry"], StoredFile]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return segment_name(self.first_block)


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class SegmentRecord:
    header: IndexHeader
    segment: Segment


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ModelPlace:
    """Where the model was that encoded the features."""

    path: Annotated[str, Field(min_length=1, max_length=4096)]
    step: Annotated[int, Field(ge=0)] | None
    """Checkpoint of a run; None for a folder."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class IndexManifest:
    header: IndexHeader
    model: ModelPlace | None
    centroids: StoredFile | None
    segments: tuple[Segment, ...]


Record = TypeVar("Record", SegmentRecord, IndexManifest)


def segment_name(first_block: int) -> str:
    """Name of a segment's folder."""
    return f"segment-{first_block:08d}"


def arrays(header: IndexHeader, videos: int) -> dict[str, tuple[np.dtype, tuple[int, ...] | None]]:
    """Type and shape of a segment's arrays; the shape of a graph's edges follows from `levels`."""
    found: dict[str, tuple[str, tuple[int, ...] | None]] = {
        "vectors": ("<f4", (videos, header.width))
    }
    if header.method == "ivf":
        found["lists"] = ("<i4", (videos,))
    if header.method == "hnsw":
        found |= {"levels": ("<i4", (videos,)), "neighbours": ("<i4", None), "entry": ("<i4", (2,))}
    return {name: (np.dtype(kind), shape) for name, (kind, shape) in found.items()}


def to_json(record: SegmentRecord | IndexManifest) -> bytes:
    """The record's text, the same for equal records."""
    return pydantic.TypeAdapter(type(record)).dump_json(record, indent=1) + b"\n"


def read_record(path: Path, kind: type[Record]) -> Record:
    """Reads index.json or segment.json, and checks every field.

    Raises:
        FileNotFoundError: there is none.
        ShardCorrupt: a field is missing or not allowed; names file, field and value.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ShardCorrupt(f"{path}: {size} bytes; allowed are {MAX_JSON_BYTES}; build it again")
    try:
        record = pydantic.TypeAdapter(kind).validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the content"
        given = f"{first.get('input')!r:.200}"
        raise ShardCorrupt(
            f"{path}: damaged or edited: {field}: {first['msg']} (given: {given}); build it again"
        ) from error
    if isinstance(record, SegmentRecord):
        _check_segment(path, record.header, record.segment)
        return record
    names = [(each.source, each.first_block) for each in record.segments]
    if len(set(names)) != len(names):
        raise ShardCorrupt(f"{path}: damaged or edited: segments: two of the same name")
    for segment in record.segments:
        _check_segment(path, record.header, segment)
        if segment.centroids != (record.centroids and record.centroids.sha256):
            raise ShardCorrupt(
                f"{path}: damaged or edited: segment {segment.name} has other centroids;"
                " build it again"
            )
    header = record.header
    size = 4 * header.num_lists * header.width
    if (header.method == "ivf") != (record.centroids is not None and header.num_lists > 0) or (
        record.centroids is not None and record.centroids.num_bytes != size
    ):
        raise ShardCorrupt(f"{path}: damaged or edited: centroids must be {size} bytes, of ivf")
    return record


def _check_segment(path: Path, header: IndexHeader, segment: Segment) -> None:
    expected = arrays(header, segment.videos)
    if set(segment.files) != set(expected):
        raise ShardCorrupt(
            f"{path}: damaged or edited: files={sorted(segment.files)} must be {sorted(expected)}"
        )
    for name, (kind, shape) in expected.items():
        size = segment.files[name].num_bytes  # type: ignore[index]
        needed = None if shape is None else kind.itemsize * int(np.prod(shape, dtype=np.int64))
        if size % kind.itemsize or needed not in (None, size):
            raise ShardCorrupt(
                f"{path}: damaged or edited: {name} of {size} bytes must have {needed} bytes"
            )
    if not segment.first_block < segment.end_block:
        raise ShardCorrupt(f"{path}: damaged or edited: end_block={segment.end_block} is too small")


def read_array(
    path: Path, stored: StoredFile, kind: np.dtype, shape: tuple[int, ...], *, hashed: bool = True
) -> np.ndarray:
    """Reads an array into memory and compares it with its record; `shape` is that of the record.

    Raises:
        ShardCorrupt: as `check_file`; the hash is that of what was read.
    """
    check_file(path, stored, hashed=False, remedy=BUILD_AGAIN)
    array = np.empty(shape, kind)
    content = array.reshape(-1).view(np.uint8).data
    with path.open("rb") as file:
        if file.readinto(content) != len(content):
            raise ShardCorrupt(f"{path}: cut short while it was read; build the index again")
    if hashed and hashlib.sha256(content).hexdigest() != stored.sha256:
        raise ShardCorrupt(f"{path}: its content differs from what was written; build it again")
    return array


def same(one: IndexHeader, other: IndexHeader, where: str) -> None:
    """Raises ValueError, which names the difference, if segments of both cannot be mixed."""
    for name, mine in asdict(one).items():
        others = getattr(other, name)
        if mine != others:
            raise ValueError(
                f"{where} holds an index with {name}={mine}, not {others}; remove that folder to"
                " build another index"
            )
