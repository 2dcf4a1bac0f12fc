"""The record of a complete shard, from which an interrupted packing resumes.

Its name says which shard it is, in how many files it lies and how many clips were refused, so that
a task knows the progress of all tasks from a listing.
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tvr.data_prep.dataset.index_rules import (
    COLUMN_TYPES,
    TEXT_COLUMNS,
    IndexFields,
    check_rows,
)
from tvr.data_prep.dataset.manifest import Shard, shard_name
from tvr.data_prep.dataset.sample_table import SampleTable, text_array
from tvr.data_prep.packing.output_files import seal, unseal
from tvr.data_prep.packing.pack_clip import RefusedClip
from tvr.data_prep.records import ShardCorrupt
from tvr.data_prep.storage.storage import PARTIAL_SUFFIX

COLUMNS = (*TEXT_COLUMNS, *COLUMN_TYPES)
RECORD = "the record"
RECORD_NAME = re.compile(r"shard-(\d+)-(\d{6,})-(\d+)-(\d+)\.json")
# Files that `publish` may remove, with their generation; the number of a shard has six digits.
SHARD_FILES = re.compile(r"shard-(?:(\d+)-)?\d{6,}(?:-\d{3,5})?\.tar")
COLUMN_FILES = re.compile(r"samples(?:-(\d+))?\.\w+")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A tar file of a shard."""

    shard: Shard
    num_captions: int
    samples: SampleTable | None
    """Rows of this file, with `shard` 0; None = not held in memory, see `ShardRecords.rows`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A complete shard of the plan. If all its clips are bad, it has no file."""

    files: tuple[ShardFile, ...]
    """In sample order; several if the samples exceed the size of a file."""
    num_empty_captions: int
    bad: tuple[RefusedClip, ...]
    """Refused clips in plan order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordName:
    """What the name of a record says."""

    generation: int
    number: int
    """Number of the shard in the plan."""
    num_files: int
    num_bad: int

    @property
    def text(self) -> str:
        """The file name."""
        numbers = f"{self.generation}-{self.number:06d}-{self.num_files}-{self.num_bad}"
        return f"shard-{numbers}.json"


def parse_record_name(name: str) -> RecordName | None:
    """Returns what a record's name says; None for the name of another file."""
    match = RECORD_NAME.fullmatch(name)
    if match is None:
        return None
    generation, number, num_files, num_bad = map(int, match.groups())
    return RecordName(generation=generation, number=number, num_files=num_files, num_bad=num_bad)


def file_name(number: int, generation: int, part: int) -> str:
    """Returns the name of a file of a shard, the first of which has the shard's own name."""
    name = shard_name(number, generation)
    return name if part == 0 else f"{name.removesuffix('.tar')}-{part:03d}.tar"


def is_replaced(name: str, generation: int) -> bool:
    """True for a file of an earlier packing, and for a leftover of this one.

    Files of a later packing stay. Columns of this generation stay: the manifest names them.
    """
    if shard := SHARD_FILES.fullmatch(name):
        return int(shard[1] or 0) <= generation
    if columns := COLUMN_FILES.fullmatch(name):
        return int(columns[1] or 0) < generation
    return name.endswith(PARTIAL_SUFFIX)


def packing_id(fingerprint: str, generation: int) -> str:
    """Identifies the packing to which a record belongs."""
    return f"{fingerprint} {generation}"


def encode_record(record: ShardRecord, packing: str) -> bytes:
    """Returns the record as JSON with its hash."""
    fields = {
        "packing": packing,
        "files": [
            {
                "shard": asdict(file.shard),
                "samples": {name: getattr(file.samples, name).tolist() for name in COLUMNS},
            }
            for file in record.files
        ],
        "num_empty_captions": record.num_empty_captions,
        "bad": [asdict(entry) for entry in record.bad],
    }
    return seal(fields)


def decode_record(content: bytes, packing: str) -> ShardRecord | None:
    """Parses a record. Returns None if it is damaged or belongs to another packing."""
    try:
        fields = unseal(content)
        if fields["packing"] != packing:
            return None
        return ShardRecord(
            files=tuple(_decode_file(file) for file in fields["files"]),
            num_empty_captions=fields["num_empty_captions"],
            bad=tuple(RefusedClip(**entry) for entry in fields["bad"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError, ShardCorrupt) as error:
        log.warning("a shard's record is damaged, packing the shard again: %r", error)
        return None


def _decode_file(fields: dict[str, Any]) -> ShardFile:
    columns: dict[str, np.ndarray] = {
        name: text_array([str(text) for text in fields["samples"][name]]) for name in TEXT_COLUMNS
    }
    for name, dtype in COLUMN_TYPES.items():
        columns[name] = np.array(fields["samples"][name], dtype=dtype)
    IndexFields(fields, RECORD).child("shard").shard(".tar")
    shard = Shard(**fields["shard"])
    check_rows(columns, shard.shard_bytes, is_tar=True, where=RECORD)
    num_captions = int(columns["num_captions"].sum())
    return ShardFile(shard=shard, num_captions=num_captions, samples=SampleTable(**columns))
