"""The record of one complete shard, which a packing that goes on is made from."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass

import numpy as np

from tvr.data_prep.dataset.manifest import SampleTable, Shard
from tvr.data_prep.packing.pack_clip import RefusedClip

DTYPES = {
    "key": np.str_,
    "video_id": np.str_,
    "shard": np.int32,
    "offset": np.int64,
    "length": np.int64,
    "crc32": np.uint32,
    "num_captions": np.int32,
    "content": np.uint64,
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShardRecord:
    """A complete shard; without samples, since all its clips are bad, it has no file."""

    shard: Shard
    samples: SampleTable
    """Its rows, as if it were the only shard."""
    num_empty_captions: int
    bad: tuple[RefusedClip, ...]
    """In clip order."""


def record_name(number: int) -> str:
    """The file of a planned shard's record."""
    return f"shard-{number:06d}.json"


def packing_id(fingerprint: str, generation: int) -> str:
    """Tells records apart that may lie in one folder."""
    return f"{fingerprint} {generation}"


def record_bytes(record: ShardRecord, packing: str) -> bytes:
    """The record as JSON."""
    fields = {
        "packing": packing,
        "shard": asdict(record.shard),
        "samples": {name: getattr(record.samples, name).tolist() for name in DTYPES},
        "num_empty_captions": record.num_empty_captions,
        "bad": [asdict(entry) for entry in record.bad],
    }
    return json.dumps(fields, ensure_ascii=False).encode()


def read_record(content: bytes, packing: str) -> ShardRecord | None:
    """None where it is another packing's, or damaged: the shard is made again then."""
    try:
        fields = json.loads(content)
        if fields["packing"] != packing:
            return None
        columns = {
            name: np.array(fields["samples"][name], dtype=dtype) for name, dtype in DTYPES.items()
        }
        return ShardRecord(
            shard=Shard(**fields["shard"]),
            samples=SampleTable(**columns),
            num_empty_captions=fields["num_empty_captions"],
            bad=tuple(RefusedClip(**entry) for entry in fields["bad"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        log.warning("a shard's record is damaged, the shard is packed again: %r", error)
        return None
