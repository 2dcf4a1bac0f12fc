"""A checkpoint's manifest, and the comparison of its files with it.

manifest.json records size and sha256 of every file of a checkpoint, and a sha256 of its own other
fields. It is the last file written: a folder without it is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import pydantic

from tvr.data_prep.storage.storage_folder import StorageFolder

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
READ_BYTES = 1 << 22
# A missing file is damage. Any other OSError of a disk or store may pass.
MISSING_FILE_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size and digest of a file as written."""

    num_bytes: int
    sha256: str


@pydantic.dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """A checkpoint without its tensors. The position in the data follows from `step`."""

    step: int
    world_size: int
    zero_stage: int
    precision: str
    """Precision and layout of the states, as `engine.deepspeed_config.state_layout` names them."""
    attempt: int
    """Number of the run's start that wrote the checkpoint."""
    quarantine: dict[str, str] = field(default_factory=dict)
    """Bad samples of all ranks so far: key to reason."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Counters that continue after a restart."""
    files: dict[str, FileRecord]
    """Record of each file, by path relative to the checkpoint's folder."""


def write_manifest(storage: StorageFolder, folder: str, state: SavedState) -> None:
    """Writes the manifest that turns the files in `folder` into a checkpoint."""
    fields = {"format_version": FORMAT_VERSION, **asdict(state)}
    text = json.dumps({**fields, "sha256": _digest(fields)}, indent=1) + "\n"
    storage.write_atomically(f"{folder}/{MANIFEST}", text.encode())


def read_manifest(storage: StorageFolder, folder: str) -> SavedState:
    """Reads and validates the manifest in `folder`.

    Raises:
        ValueError: it is damaged, or has another format version.
        OSError: it cannot be read.
    """
    path = storage.path(f"{folder}/{MANIFEST}")
    try:
        fields = json.loads(storage.read(f"{folder}/{MANIFEST}"))
        digest = fields.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {error!r}") from None
    if digest != _digest(fields):
        raise ValueError(f"{path}: damaged: its sha256 does not match its content")
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version={version}, this release reads {FORMAT_VERSION}")
    try:
        state = pydantic.TypeAdapter(SavedState).validate_python(fields)
    except pydantic.ValidationError as error:
        raise ValueError(
            f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
        ) from None
    outside = [name for name in state.files if name.startswith("/") or ".." in name.split("/")]
    if outside:
        raise ValueError(f"{path}: damaged: it lists files outside the checkpoint: {outside}")
    return state


def find_unlisted_files(
    storage: StorageFolder, folder: str, state: SavedState, part: str
) -> list[str]:
    """A line for each file in `folder`/`part` that the manifest does not list.

    Such a file is damage, since the loader of that part might read it.
    """
    listed = {name.split("/")[1] for name in state.files if name.startswith(f"{part}/")}
    return [
        f"{storage.path(f'{folder}/{part}/{name}')}: the manifest does not list it"
        for name in storage.list_names(f"{folder}/{part}")
        if name not in listed
    ]


def find_damage(
    storage: StorageFolder,
    folder: str,
    state: SavedState,
    names: Iterable[str],
    copies: StorageFolder | None = None,
) -> list[str]:
    """A line for each of these files that differs from its record. It reads each file once.

    Args:
        copies: Gets a copy of each intact file, under the same name.

    Raises:
        OSError: a file cannot be read, or copied, at the moment.
    """
    found = (_damage(storage, folder, name, state.files[name], copies) for name in names)
    return [line for line in found if line is not None]


def _damage(
    storage: StorageFolder,
    folder: str,
    name: str,
    record: FileRecord,
    copies: StorageFolder | None,
) -> str | None:
    """How a file differs from its record; None if it does not."""
    path, partial = storage.path(f"{folder}/{name}"), f"{name}.partial"
    with nullcontext() if copies is None else copies.open_write(partial) as copy:
        try:
            found = _read_through(storage, f"{folder}/{name}", copy)
        except MISSING_FILE_ERRORS as error:
            return f"{path}: {type(error).__name__}: {error}"
    if found.num_bytes != record.num_bytes:
        return f"{path}: {found.num_bytes} bytes, the manifest lists {record.num_bytes}"
    if found.sha256 != record.sha256:
        return f"{path}: its sha256 differs from the manifest's"
    if copies is not None:
        copies.rename(partial, name)  # a copy under its name is whole
    return None


def _read_through(storage: StorageFolder, name: str, copy: Any) -> FileRecord:
    """Size and digest of a file, which is also written to `copy`, if that is a file."""
    digest, num_bytes = hashlib.sha256(), 0
    with storage.open_read(name) as file:
        while content := file.read(READ_BYTES):
            digest.update(content)
            num_bytes += len(content)
            if copy is not None:
                copy.write(content)
    return FileRecord(num_bytes=num_bytes, sha256=digest.hexdigest())


def _digest(fields: Mapping[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
