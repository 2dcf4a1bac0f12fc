"""A data set's index: `manifest.json` (totals and shards) and `samples.npz` (columns of samples).

`manifest.json` is written last and holds the sha256 of `samples.npz`, so a data set with a
`manifest.json` is complete. A data set that replaces another one has a generation number in its
file names. Both share the folder until the new `manifest.json` replaces the old one.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, cast, get_args

import numpy as np
from fsspec.core import url_to_fs

from tvr.data_prep.dataset.index_rules import (
    MAX_COLUMNS_BYTES,
    MAX_COUNT,
    MAX_FRAMES,
    MAX_GENERATION,
    MAX_MANIFEST_BYTES,
    MAX_SIDE,
    IndexFields,
    check_rows,
    read_columns,
)
from tvr.data_prep.records import PACKED_WITHOUT_WORDS, ShardCorrupt
from tvr.data_prep.storage.storage import Storage, write_file

# Increase it with every change of the stored format, and list the change in CHANGELOG as a
# shard-format break.
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
BAD_NAME = "bad.jsonl"
PIECE_BYTES = 1 << 25

Layout = Literal["video", "frames"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file of samples: a tar archive, or the FFCV file (beton) of a whole data set."""

    name: str
    num_samples: int
    shard_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleTable:
    """One row per sample, in shard order.

    Columns keep a million samples in tens of megabytes.
    """

    key: np.ndarray  # str
    video_id: np.ndarray  # str
    shard: np.ndarray  # int32, index in Manifest.shards
    offset: np.ndarray  # int64, first byte in the shard, a multiple of 512
    length: np.ndarray  # int64, bytes of the sample's tar members, a multiple of 512
    crc32: np.ndarray  # uint32 of these bytes
    num_captions: np.ndarray  # int32
    content: np.ndarray  # uint64, see `content_hash`

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Manifest:
    """Index of a data set."""

    layout: Layout
    num_frames: int
    """Frames stored per sample, fewer for a shorter video; 0 in the video layout, which stores all
    frames."""
    short_side: int | None
    """Pixels of the shorter side; None = size of the source."""
    num_captions: int
    num_empty_captions: int
    """Empty captions dropped from clips with other captions."""
    bad: dict[str, int]
    """Clips refused by packing, by reason; bad.jsonl lists them."""
    shards: tuple[Shard, ...]
    samples: SampleTable
    tagger: str | None = None
    """Name and version of the tagger of the captions' words; None = packed without words."""
    fingerprint: str = ""
    """Fingerprint of the clips and settings, see `PackPlan`."""
    generation: int = 0
    """Number of data sets that the folder held before this one."""
    beton: Shard | None = None
    """FFCV file that holds all samples. `shards` then lists the tar shards it was made from, which
    still determine the sample order."""

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each shard; the sample order is a function of these."""
        return tuple(shard.num_samples for shard in self.shards)

    @property
    def files(self) -> tuple[Shard, ...]:
        """The files that hold the samples, in row order."""
        return self.shards if self.beton is None else (self.beton,)

    def rows_of_file(self, file: int) -> list[int]:
        """Returns the rows of the samples in a file, by its index in `files`."""
        if self.beton is not None:
            return list(range(self.num_samples))
        return np.flatnonzero(self.samples.shard == file).tolist()

    def file_of_shard(self, shard: int) -> Shard:
        """Returns the file that holds the samples of a shard."""
        return self.shards[shard] if self.beton is None else self.beton


def shard_name(number: int, generation: int) -> str:
    """Returns the file name of a shard."""
    return f"shard-{number:06d}.tar" if not generation else f"shard-{generation}-{number:06d}.tar"


def samples_name(generation: int) -> str:
    """Returns the file name of the columns."""
    return "samples.npz" if not generation else f"samples-{generation}.npz"


def concat_samples(parts: Sequence[SampleTable]) -> SampleTable:
    """Concatenates the rows of shards and sets `shard` to the index of each part."""
    columns = {name: [getattr(part, name) for part in parts] for name in SampleTable.__slots__}
    columns["shard"] = [
        np.full(len(part), number, dtype=np.int32) for number, part in enumerate(parts)
    ]
    return SampleTable(**{name: np.concatenate(column) for name, column in columns.items()})


def join_url(url: str, name: str) -> str:
    """Returns the URL of a file in the folder `url`."""
    return f"{url.rstrip('/')}/{name}"


def read_manifest(url: str) -> Manifest:
    """Reads and checks the index of a data set at a folder path or fsspec URL.

    Raises:
        FileNotFoundError: there is no complete data set at `url`.
        OSError: the storage fails.
        ValueError: the data set has another format version.
        ShardCorrupt: the index is damaged, or a value is not allowed; see `index_rules`.
    """
    fields = read_manifest_json(url)
    version = fields.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{join_url(url, MANIFEST_NAME)}: format_version={version!r}, this release reads"
            f" {FORMAT_VERSION}; pack the data set again"
        )
    where = join_url(url, MANIFEST_NAME)
    index = IndexFields(fields, where)
    shards = tuple(Shard(**shard.shard(".tar")) for shard in index.children("shards"))
    has_beton = fields.get("beton") is not None
    beton = Shard(**index.child("beton").shard(".beton")) if has_beton else None
    num_samples = sum(shard.num_samples for shard in shards)
    if beton is not None and beton.num_samples != num_samples:
        index.refuse("beton.num_samples", beton.num_samples, f"{num_samples}, as in its shards")
    manifest = Manifest(
        layout=cast(Layout, index.choice("layout", get_args(Layout))),
        num_frames=index.integer("num_frames", 0, MAX_FRAMES),
        short_side=index.optional_integer("short_side", 1, MAX_SIDE),
        num_captions=index.integer("num_captions", 0, MAX_COUNT),
        num_empty_captions=index.integer("num_empty_captions", 0, MAX_COUNT),
        tagger=index.optional_text("tagger"),
        bad=index.bad_counts("bad"),
        shards=shards,
        samples=_read_samples(url, index.child("samples"), shards, beton),
        fingerprint=index.text("fingerprint"),
        generation=index.integer("generation", 0, MAX_GENERATION),
        beton=beton,
    )
    _check_agreement(manifest, url)
    return manifest


def check_words(url: str, manifest: Manifest, *, needed_by: str) -> None:
    """Raises ValueError if the data set was packed without words.

    Args:
        needed_by: Setting that the error names.
    """
    if manifest.tagger is None:
        raise ValueError(
            f"{needed_by} needs the words of captions, and {url} was {PACKED_WITHOUT_WORDS}"
        )


def write_manifest(url: str, manifest: Manifest) -> None:
    """Writes the columns, then `manifest.json`, each atomically."""
    buffer = io.BytesIO()
    columns = {name: getattr(manifest.samples, name) for name in SampleTable.__slots__}
    np.savez_compressed(buffer, allow_pickle=False, **columns)
    samples = samples_name(manifest.generation)
    fields = {
        "format_version": FORMAT_VERSION,
        "fingerprint": manifest.fingerprint,
        "generation": manifest.generation,
        "layout": manifest.layout,
        "num_frames": manifest.num_frames,
        "short_side": manifest.short_side,
        "num_samples": manifest.num_samples,
        "num_captions": manifest.num_captions,
        "num_empty_captions": manifest.num_empty_captions,
        "tagger": manifest.tagger,
        "bad": manifest.bad,
        "samples": {"name": samples, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()},
        "shards": [asdict(shard) for shard in manifest.shards],
        "beton": asdict(manifest.beton) if manifest.beton else None,
    }
    fs, root = url_to_fs(url)
    write_file(fs, join_url(root, samples), buffer.getvalue())
    text = json.dumps(fields, indent=1, ensure_ascii=False) + "\n"
    write_file(fs, join_url(root, MANIFEST_NAME), text.encode())


def read_manifest_json(url: str) -> dict:
    """Reads `manifest.json` of any version without checks. Raises as `read_manifest`."""
    location = join_url(url, MANIFEST_NAME)
    try:
        content = _read_at_most(url, MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{location} does not exist: no data set there, or packing did not finish; make one"
            " with `tvr pack`"
        ) from error
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ShardCorrupt(f"{location}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ShardCorrupt(f"{location}: expected a JSON object, found {type(fields).__name__}")
    return fields


def _read_at_most(url: str, name: str, most: int) -> bytes:
    """Reads a file piece by piece: a hostile store could send bytes without end."""
    store, content = Storage(url), bytearray()
    while len(content) <= most:
        piece = store.read_range(name, len(content), len(content) + PIECE_BYTES)
        content += piece
        if len(piece) < PIECE_BYTES:
            return bytes(content)
    raise ShardCorrupt(f"{join_url(url, name)}: has more than {most} bytes")


def _read_samples(
    url: str, entry: IndexFields, shards: Sequence[Shard], beton: Shard | None
) -> SampleTable:
    name, sha256 = entry.file_name("name", ".npz"), entry.sha256("sha256")
    location = join_url(url, name)
    try:
        content = _read_at_most(url, name, MAX_COLUMNS_BYTES)
    except FileNotFoundError as error:
        raise ShardCorrupt(f"{location} is missing although {MANIFEST_NAME} is there") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ShardCorrupt(f"{location}: sha256 differs from the one in {MANIFEST_NAME}")
    columns = read_columns(content, sum(shard.num_samples for shard in shards), location)
    file_bytes = np.array([(beton or shard).shard_bytes for shard in shards])
    check_rows(columns, file_bytes, is_tar=beton is None, where=location)
    return SampleTable(**columns)


def _check_agreement(manifest: Manifest, url: str) -> None:
    counts = np.bincount(manifest.samples.shard, minlength=len(manifest.shards))
    in_order = bool(np.all(np.diff(manifest.samples.shard) >= 0))
    if tuple(counts.tolist()) != manifest.shard_sizes or not in_order:
        raise ShardCorrupt(
            f"{url}: {MANIFEST_NAME} and the columns disagree on the samples per shard"
        )
