"""A checkpoint's manifest, and the comparison of its files with it.

manifest.json records where the files of a checkpoint lie, the size and sha256 of each, and a sha256
of its own other fields. It is the last file written: a step's folder without it is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import pydantic

from tvr.data_prep.storage.storage_folder import StorageFolder

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
# The files of version 1 lie directly in the step's folder.
READ_VERSIONS = (1, 2)
ATTEMPT_FOLDER = re.compile(r"attempt-(\d{6,})-[0-9a-f]{8}-\d+")
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
    settings: dict[str, Any] = field(default_factory=dict)
    """The run's settings, as `config.to_json` writes them; empty in earlier releases."""
    contents: dict[str, str] = field(default_factory=dict)
    """Digest of what a data set or a model folder held, by the setting that names it."""
    folder: str = ""
    """Folder of the files, relative to the step's; the attempt and the save that wrote them."""
    files: dict[str, FileRecord]
    """Record of each file, by path relative to `folder`."""

    def files_folder(self, name: str) -> str:
        """Folder of the files of the checkpoint `name`."""
        return f"{name}/{self.folder}" if self.folder else name


def create_manifest(
    storage: StorageFolder,
    name: str,
    state: SavedState,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Writes the manifest that turns the files in `state.folder` into the checkpoint `name`.

    Args:
        before: Called right before each attempt at it; its error ends the call.

    Raises:
        FileExistsError: the step has another manifest.
    """
    fields = {"format_version": FORMAT_VERSION, **asdict(state)}
    text = json.dumps({**fields, "sha256": _digest(fields)}, indent=1) + "\n"
    storage.create(f"{name}/{MANIFEST}", text.encode(), before)


def read_manifest(storage: StorageFolder, folder: str) -> SavedState:
    """Reads and validates the manifest in a step's folder.

    Raises:
        ValueError: it is damaged, or has another format version.
        OSError: it cannot be read.
    """
    path = storage.path(f"{folder}/{MANIFEST}")
    try:
        fields = json.loads(storage.read(f"{folder}/{MANIFEST}"))
        digest = fields.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {error!r:.200}") from None
    if digest != _digest(fields):
        raise ValueError(f"{path}: damaged: its sha256 does not match its content")
    version = fields.pop("format_version", None)
    if version not in READ_VERSIONS:
        known = " and ".join(map(str, READ_VERSIONS))
        raise ValueError(f"{path}: format_version={version}, this release reads {known}")
    try:
        state = pydantic.TypeAdapter(SavedState).validate_python(fields)
    except pydantic.ValidationError as error:
        raise ValueError(
            f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
        ) from None
    if state.folder and not ATTEMPT_FOLDER.fullmatch(state.folder):
        raise ValueError(f"{path}: damaged: folder={state.folder!r} is not a save's")
    outside = [name for name in state.files if name.startswith("/") or ".." in name.split("/")]
    if outside:
        raise ValueError(f"{path}: damaged: it lists files outside the checkpoint: {outside}")
    return state


def find_unlisted_files(
    storage: StorageFolder, name: str, state: SavedState, part: str
) -> list[str]:
    """A line for each local file in `part` of a checkpoint that the manifest does not list.

    Such a file is damage, since the loader of that part might read it. From a store only the files
    that the manifest lists are fetched.
    """
    if not storage.is_local:
        return []
    folder = f"{state.files_folder(name)}/{part}"
    listed = {file.split("/")[1] for file in state.files if file.startswith(f"{part}/")}
    return [
        f"{storage.path(f'{folder}/{file}')}: the manifest does not list it"
        for file in storage.list_names(folder)
        if file not in listed
    ]


def find_damage(
    storage: StorageFolder,
    name: str,
    state: SavedState,
    files: Iterable[str],
    copies: StorageFolder | None = None,
) -> list[str]:
    """A line for each of these files of a checkpoint that differs from its record.

    It reads each file once.

    Args:
        files: Names in the manifest.
        copies: Gets a copy of each intact file, under the same name.

    Raises:
        OSError: a file cannot be read, or copied, at the moment.
    """
    folder = state.files_folder(name)
    found = (_damage(storage, folder, file, state.files[file], copies) for file in files)
    return [line for line in found if line is not None]


class _Differs(Exception):
    """A file differs from its record; its copy is then given up."""


def _damage(
    storage: StorageFolder,
    folder: str,
    name: str,
    record: FileRecord,
    copies: StorageFolder | None,
) -> str | None:
    """How a file differs from its record; None if it does not."""
    try:
        with nullcontext() if copies is None else copies.open_write(name) as copy:
            _compare(storage, f"{folder}/{name}", record, copy)
    except _Differs as error:
        return str(error)
    return None


def _compare(storage: StorageFolder, name: str, record: FileRecord, copy: Any) -> None:
    """Compares a file with its record while it writes it to `copy`, if that is a file."""
    path, digest, num_bytes = storage.path(name), hashlib.sha256(), 0
    chunks = storage.read_chunks(name)
    while True:
        try:
            content = next(chunks, None)
        except MISSING_FILE_ERRORS as error:
            raise _Differs(f"{path}: {type(error).__name__}: {error}") from None
        if content is None:
            break
        digest.update(content)
        num_bytes += len(content)
        if copy is not None:
            copy.write(content)
    if num_bytes != record.num_bytes:
        raise _Differs(f"{path}: {num_bytes} bytes, the manifest lists {record.num_bytes}")
    if digest.hexdigest() != record.sha256:
        raise _Differs(f"{path}: its sha256 differs from the manifest's")


def _digest(fields: Mapping[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
