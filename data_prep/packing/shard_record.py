"""The record of a complete shard, from which an interrupted packing resumes."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass

import numpy as np

from tvr.data_prep.dataset.index_rules import (
    COLUMN_TYPES,
    TEXT_COLUMNS,
    IndexFields,
    check_rows,
)
from tvr.data_prep.dataset.manifest import Shard
from tvr.data_prep.dataset.sample_table import SampleTable, text_array
from tvr.data_prep.packing.pack_clip import RefusedClip
from tvr.data_prep.records import ShardCorrupt

COLUMNS = (*TEXT_COLUMNS, *COLUMN_TYPES)
RECORD = "the record"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A complete shard. If all its clips are bad, `samples` is empty and the shard has no file."""

    shard: Shard
    samples: SampleTable
    """Rows of this shard, with `shard` 0."""
    num_empty_captions: int
    bad: tuple[RefusedClip, ...]
    """Refused clips in plan order."""


def record_name(number: int) -> str:
    """Returns the file name of a shard's record."""
    return f"shard-{number:06d}.json"


def packing_id(fingerprint: str, generation: int) -> str:
    """Identifies the packing to which a record belongs."""
    return f"{fingerprint} {generation}"


def encode_record(record: ShardRecord, packing: str) -> bytes:
    """Returns the record as JSON."""
    fields = {
        "packing": packing,
        "shard": asdict(record.shard),
        "samples": {name: getattr(record.samples, name).tolist() for name in COLUMNS},
        "num_empty_captions": record.num_empty_captions,
        "bad": [asdict(entry) for entry in record.bad],
    }
    return json.dumps(fields, ensure_ascii=False).encode()


def decode_record(content: bytes, packing: str) -> ShardRecord | None:
    """Parses a record. Returns None if it is damaged or belongs to another packing."""
    try:
        fields = json.loads(content)
        if fields["packing"] != packing:
            return None
        columns: dict[str, np.ndarray] = {
            name: text_array([str(text) for text in fields["samples"][name]])
            for name in TEXT_COLUMNS
        }
        for name, dtype in COLUMN_TYPES.items():
            columns[name] = np.array(fields["samples"][name], dtype=dtype)
        shard = Shard(**fields["shard"])
        if len(columns["key"]):
            IndexFields(fields, RECORD).child("shard").shard(".tar")
            check_rows(columns, shard.shard_bytes, is_tar=True, where=RECORD)
        return ShardRecord(
            shard=shard,
            samples=SampleTable(**columns),
            num_empty_captions=fields["num_empty_captions"],
            bad=tuple(RefusedClip(**entry) for entry in fields["bad"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError, ShardCorrupt) as error:
        log.warning("a shard's record is damaged, packing the shard again: %r", error)
        return None
