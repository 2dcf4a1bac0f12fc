"""What a checkpoint says of itself, and whether its files are the ones that were written.

manifest.json covers every file of a checkpoint by size and sha256, and itself by a sha256 over its
other fields. It is the last file written: a folder without one is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pydantic

from tvr.trainer.checkpoint.place import Place

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
READ_BYTES = 1 << 22
# What reading meets where a file is not there; any other error of a disk or store may pass.
GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file, as it was written."""

    num_bytes: int
    sha256: str


@pydantic.dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """A checkpoint less its tensors. The position in the data follows from `step`."""

    step: int
    world_size: int
    zero_stage: int
    precision: str
    attempt: int
    """Which start of the run wrote it."""
    quarantine: dict[str, str] = field(default_factory=dict)
    """Keys of the samples that were bad so far, on any rank, each with its reason."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Counters that go on counting after a restart."""
    files: dict[str, FileRecord]
    """By name within the checkpoint's folder."""


def write_manifest(place: Place, folder: str, state: SavedState) -> None:
    """Makes the files in `folder` a checkpoint."""
    fields = {"format_version": FORMAT_VERSION, **asdict(state)}
    text = json.dumps({**fields, "sha256": _digest(fields)}, indent=1) + "\n"
    place.write_whole(f"{folder}/{MANIFEST}", text.encode())


def read_manifest(place: Place, folder: str) -> SavedState:
    """Raises ValueError for one that is damaged or of another format, OSError if unreadable."""
    where = place.path(f"{folder}/{MANIFEST}")
    try:
        fields = json.loads(place.read(f"{folder}/{MANIFEST}"))
        said = fields.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{where}: damaged: {error!r}") from None
    if said != _digest(fields):
        raise ValueError(f"{where}: damaged: its sha256 is not that of its content")
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{where}: format_version={version}, this release reads {FORMAT_VERSION}")
    try:
        state = pydantic.TypeAdapter(SavedState).validate_python(fields)
    except pydantic.ValidationError as error:
        raise ValueError(
            f"{where}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
        ) from None
    outside = [name for name in state.files if name.startswith("/") or ".." in name.split("/")]
    if outside:
        raise ValueError(f"{where}: damaged: names files that are no part of it: {outside}")
    return state


def unlisted(place: Place, folder: str, state: SavedState, part: str) -> list[str]:
    """A line for each file in a part of a checkpoint that its manifest does not cover: what loads
    that part might take it for its own."""
    listed = {name.split("/")[1] for name in state.files if name.startswith(f"{part}/")}
    return [
        f"{place.path(f'{folder}/{part}/{name}')}: the manifest does not list it"
        for name in place.names(f"{folder}/{part}")
        if name not in listed
    ]


def damage(place: Place, folder: str, state: SavedState, names: Iterable[str]) -> list[str]:
    """What is wrong with these files of a checkpoint, a line each. Raises OSError where that cannot
    be known at the moment."""
    return [line for name in names if (line := _damage(place, folder, name, state.files[name]))]


def _damage(place: Place, folder: str, name: str, record: FileRecord) -> str | None:
    where = place.path(f"{folder}/{name}")
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with place.reading(f"{folder}/{name}") as file:
            while content := file.read(READ_BYTES):
                digest.update(content)
                num_bytes += len(content)
    except GONE as error:
        return f"{where}: {type(error).__name__}: {error}"
    if num_bytes != record.num_bytes:
        return f"{where}: {num_bytes} bytes, written were {record.num_bytes}"
    if digest.hexdigest() != record.sha256:
        return f"{where}: its sha256 is not the one that was written"
    return None


def _digest(fields: Mapping[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
