"""A data set's index: `manifest.json` (totals and shards) and `samples.rows` (a row per sample).

`manifest.json` is written last and holds the hash of `samples.rows`, so a data set with a
`manifest.json` is complete. A data set that replaces another one has a generation number in its
file names. Both share the folder until the new `manifest.json` replaces the old one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import numpy as np
from fsspec.core import url_to_fs

from tvr.data_prep.dataset.foreign_samples import ForeignRules, parse_rules
from tvr.data_prep.dataset.index_rules import (
    MAX_COUNT,
    MAX_FILE_BYTES,
    MAX_FRAMES,
    MAX_GENERATION,
    MAX_MANIFEST_BYTES,
    MAX_SAMPLES,
    MAX_SIDE,
    IndexFields,
)
from tvr.data_prep.dataset.mapped_samples import MappedRows, SampleFiles
from tvr.data_prep.dataset.sample_blocks import RowsFile, write_rows
from tvr.data_prep.dataset.sample_table import SampleTable, concat_samples
from tvr.data_prep.records import PACKED_WITHOUT_WORDS, ShardCorrupt
from tvr.data_prep.storage.storage import Storage, write_file

# Increase it with every change of the stored format, and list the change in CHANGELOG as a
# shard-format break.
FORMAT_VERSION = 3
# `tvr upgrade` reads data sets of this version.
UPGRADED_VERSION = 2
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
    foreign: ForeignRules | None = None
    """How samples are read whose shards another tool wrote; None = `tvr pack` wrote them."""
    check_samples: Callable[[], None] = lambda: None
    """Checks all rows, where `read_manifest` opened them. Raises ShardCorrupt."""
    row_starts: np.ndarray = field(init=False)
    """First row of each shard, then the number of rows; int64."""

    def __post_init__(self) -> None:
        starts = np.cumsum([0, *self.shard_sizes], dtype=np.int64)
        object.__setattr__(self, "row_starts", starts)

    @property
    def num_samples(self) -> int:
        return int(self.row_starts[-1])

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples in each shard; the sample order is a function of these."""
        return tuple(shard.num_samples for shard in self.shards)

    @property
    def content(self) -> str:
        """Digest of the samples and their order: equal for copies of a data set at any place."""
        digested: list[Any] = [(shard.num_samples, shard.sha256) for shard in self.shards]
        if self.foreign is not None:
            # Shards of other tools hold several texts, of which the index names the captions.
            digested.append(self.foreign.captions)
        return hashlib.sha256(json.dumps(digested).encode()).hexdigest()

    @property
    def files(self) -> tuple[Shard, ...]:
        """The files that hold the samples, in row order."""
        return self.shards if self.beton is None else (self.beton,)

    def rows_of_file(self, file: int) -> range:
        """Returns the rows of the samples in a file, by its index in `files`."""
        if self.beton is not None:
            return range(self.num_samples)
        return range(int(self.row_starts[file]), int(self.row_starts[file + 1]))

    def files_url(self, url: str) -> str:
        """Returns the URL of the folder of `files`, for the index at a URL."""
        return (self.foreign.tars if self.foreign is not None else "") or url

    def file_of_shard(self, shard: int) -> Shard:
        """Returns the file that holds the samples of a shard."""
        return self.shards[shard] if self.beton is None else self.beton


def shard_name(number: int, generation: int) -> str:
    """Returns the file name of a shard."""
    return f"shard-{number:06d}.tar" if not generation else f"shard-{generation}-{number:06d}.tar"


def samples_name(generation: int) -> str:
    """Returns the file name of the rows."""
    return "samples.rows" if not generation else f"samples-{generation}.rows"


def join_url(url: str, name: str) -> str:
    """Returns the URL of a file in the folder `url`."""
    return f"{url.rstrip('/')}/{name}"


def read_manifest(url: str, *, node_folder: str | None = None) -> Manifest:
    """Reads and checks `manifest.json` of a data set, and opens the file of its rows.

    The rows are not read: each block of rows is checked when it is first used, by its sha256 and by
    the rules of `index_rules`. `check_samples` checks all of them.

    Args:
        url: Folder path or fsspec URL of the data set.
        node_folder: Folder on this node's disk for the rows of a remote data set, shared by all
            processes of the node; None = a folder of this user for temporary files.

    Raises:
        FileNotFoundError: there is no complete data set at `url`.
        OSError: the storage fails, or a remote data set's rows find no space on this node.
        ValueError: the data set has another format version.
        ShardCorrupt: the index is damaged, or a value is not allowed; see `index_rules`. A column
            raises it, too.
    """
    fields = read_manifest_json(url)
    _check_version(fields.get("format_version"), url)
    manifest, index = parse_manifest(fields, url), IndexFields(fields, join_url(url, MANIFEST_NAME))
    entry = index.child("samples")
    rows = MappedRows(
        url,
        entry.file_name("name", ".rows"),
        RowsFile(entry.integer("num_bytes", 1, MAX_FILE_BYTES), entry.sha256("sha256")),
        SampleFiles(
            num_samples=manifest.shard_sizes,
            num_bytes=[manifest.file_of_shard(n).shard_bytes for n in range(len(manifest.shards))],
            is_tar=manifest.beton is None,
        ),
        node_folder,
    )
    return replace(manifest, samples=rows.table(), check_samples=rows.check_all)


def parse_manifest(fields: dict[str, Any], url: str) -> Manifest:
    """Checks the fields of `manifest.json`, of this format or the one before.

    Returns:
        The manifest, without its samples.

    Raises:
        ShardCorrupt: a value is not allowed.
    """
    index = IndexFields(fields, join_url(url, MANIFEST_NAME))
    shards = tuple(Shard(**shard.shard(".tar")) for shard in index.children("shards"))
    has_beton = fields.get("beton") is not None
    beton = Shard(**index.child("beton").shard(".beton")) if has_beton else None
    num_samples = sum(shard.num_samples for shard in shards)
    if num_samples > MAX_SAMPLES:
        index.refuse("shards", num_samples, f"at most {MAX_SAMPLES} samples in all")
    if beton is not None and beton.num_samples != num_samples:
        index.refuse("beton.num_samples", beton.num_samples, f"{num_samples}, as in its shards")
    return Manifest(
        layout=cast(Layout, index.choice("layout", get_args(Layout))),
        num_frames=index.integer("num_frames", 0, MAX_FRAMES),
        short_side=index.optional_integer("short_side", 1, MAX_SIDE),
        num_captions=index.integer("num_captions", 0, MAX_COUNT),
        num_empty_captions=index.integer("num_empty_captions", 0, MAX_COUNT),
        tagger=index.optional_text("tagger"),
        bad=index.bad_counts("bad"),
        shards=shards,
        samples=concat_samples([]),
        fingerprint=index.text("fingerprint"),
        generation=index.integer("generation", 0, MAX_GENERATION),
        beton=beton,
        foreign=parse_rules(index.child("foreign"), url) if fields.get("foreign") else None,
    )


def _check_version(version: object, url: str) -> None:
    if version == FORMAT_VERSION:
        return
    hint = "pack the data set again"
    if version is None:
        hint = "this is no data set of `tvr pack`, but perhaps the features of `tvr embed`"
    if version == UPGRADED_VERSION:
        hint = f"`tvr upgrade {url}` converts the data set without packing it again"
    raise ValueError(
        f"{join_url(url, MANIFEST_NAME)}: format_version={version!r}, this release reads"
        f" {FORMAT_VERSION}; {hint}"
    )


def check_words(url: str, manifest: Manifest, *, needed_by: str) -> None:
    """Raises ValueError if the data set was packed without words.

    Args:
        needed_by: Setting that the error names.
    """
    if manifest.tagger is None:
        raise ValueError(
            f"{needed_by} needs the words of captions, and {url} was {PACKED_WITHOUT_WORDS}"
        )


def write_manifest(url: str, manifest: Manifest, rows: Iterable[SampleTable] | None = None) -> None:
    """Writes the file of rows, then `manifest.json`, each atomically.

    Args:
        url: Folder path or fsspec URL of the data set.
        manifest: Index to write.
        rows: Rows of each shard in turn, of which one is held in memory at a time; None = those of
            `manifest.samples`.

    Raises:
        ValueError: the shards have other numbers of rows, or are too many.
    """
    samples = samples_name(manifest.generation)
    fs, root = url_to_fs(url)
    written = write_rows(
        fs,
        join_url(root, samples),
        _rows_by_shard(manifest) if rows is None else rows,
        manifest.shard_sizes,
    )
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
        "samples": {"name": samples, **written._asdict()},
        "shards": [asdict(shard) for shard in manifest.shards],
        "beton": asdict(manifest.beton) if manifest.beton else None,
    }
    if manifest.foreign is not None:
        fields["foreign"] = asdict(manifest.foreign)
    text = (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode()
    if len(text) > MAX_MANIFEST_BYTES:
        raise ValueError(
            f"{join_url(url, MANIFEST_NAME)} would have {len(text)} bytes for"
            f" {len(manifest.shards)} shards, and may have {MAX_MANIFEST_BYTES}: pack more samples"
            " to a shard"
        )
    write_file(fs, join_url(root, MANIFEST_NAME), text)


def read_manifest_json(url: str) -> dict:
    """Reads `manifest.json` of any version without checks. Raises as `read_manifest`."""
    location = join_url(url, MANIFEST_NAME)
    try:
        content = read_at_most(url, MANIFEST_NAME, MAX_MANIFEST_BYTES)
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


def read_at_most(url: str, name: str, most: int) -> bytes:
    """Reads a file piece by piece: a hostile store could send bytes without end."""
    store, content = Storage(url), bytearray()
    while len(content) <= most:
        piece = store.read_range(name, len(content), len(content) + PIECE_BYTES)
        content += piece
        if len(piece) < PIECE_BYTES:
            return bytes(content)
    raise ShardCorrupt(f"{join_url(url, name)}: has more than {most} bytes")


def _rows_by_shard(manifest: Manifest) -> Iterator[SampleTable]:
    """Cuts a table at the shards, whose numbers of samples must agree with its column `shard`."""
    samples, starts = manifest.samples, manifest.row_starts.tolist()
    if len(samples) != starts[-1]:
        raise ValueError(f"{len(samples)} rows, {starts[-1]} samples in the shards")
    for shard, (start, stop) in enumerate(pairwise(starts)):
        rows = samples.rows(start, stop)
        if (np.asarray(rows.shard) != shard).any():
            raise ValueError(f"a row from {start} to {stop - 1} is not of shard {shard}")
        yield rows
