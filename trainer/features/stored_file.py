"""Arrays in files without a header, whose sizes and hashes stand in a record beside them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from tvr.data_prep.records import ShardCorrupt

STRICT = pydantic.ConfigDict(extra="forbid", strict=True)
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", max_length=64)]


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class StoredFile:
    num_bytes: Annotated[int, Field(ge=0, le=1 << 44)]
    sha256: Sha256


def write_array(path: Path, array: np.ndarray) -> StoredFile:
    """Writes an array's bytes and waits until they are on the disk."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def check_file(path: Path, stored: StoredFile, *, hashed: bool, remedy: str) -> None:
    """Compares a file with its record.

    Args:
        hashed: Also reads it; otherwise only its size is compared.
        remedy: What to do about a damaged file, for errors.

    Raises:
        ShardCorrupt: it is missing, cut short or differs; names it.
    """
    if path.is_symlink() or not path.is_file():
        raise ShardCorrupt(f"{path}: missing, or not a plain file; {remedy}")
    size = path.stat().st_size
    if size != stored.num_bytes:
        raise ShardCorrupt(f"{path}: {size} bytes instead of {stored.num_bytes}; {remedy}")
    if hashed and sha256_of(path) != stored.sha256:
        raise ShardCorrupt(f"{path}: its content differs from what was written; {remedy}")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
