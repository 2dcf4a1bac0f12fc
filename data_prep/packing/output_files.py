"""The files of an output folder: renamed into place on a local disk, one PUT each on a store.

Object stores make a PUT atomic, so that a file has its final name from the start: no copy, no
rename. Requests to a store are retried (`StorageFolder`). A large file is first written to a local
one, so that its upload can be repeated.

On a local disk, any number of processes may write a file at the same time: each has a temporary
name of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from tvr.data_prep.records import ShardCorrupt
from tvr.data_prep.storage.retries import Retries
from tvr.data_prep.storage.storage import Storage, partial_name, write_file
from tvr.data_prep.storage.storage_folder import StorageFolder

WORK_FOLDER = ".packing"
"""Folder of what is not part of the data set."""

SEAL = "sha256"
"""Field of a sealed JSON object: the hash of its other fields."""

COPY_BYTES = 1 << 22
READ_BYTES = 1 << 25

Result = TypeVar("Result")


class OutputFiles:
    """Files below a folder, a path or fsspec URL; names are relative to it."""

    def __init__(self, url: str) -> None:
        self._fs: Any
        self._fs, self._root = url_to_fs(url)
        self._folder = StorageFolder(url)
        self._reader = Storage(url)
        self._retries = Retries()
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def read(self, name: str) -> bytes | None:
        """Reads a file; None if it does not exist."""
        content, piece = bytearray(), b""
        try:
            # By ranges: some clients ask for the size first, and then look for a folder.
            while not content or len(piece) == READ_BYTES:
                piece = self.read_range(name, len(content), len(content) + READ_BYTES)
                content += piece
                if not piece:
                    break
        except FileNotFoundError:
            return None
        return bytes(content)

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Reads the bytes [start, end). Raises FileNotFoundError if there is no such file."""
        return self._reader.read_range(name, start, end)

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file; readers see the old content or the new."""
        path = self._path(name)
        if self.is_local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        write_file(self._fs, path, content)

    def read_sealed(self, name: str) -> dict[str, Any] | None:
        """Reads the fields of a file of `write_sealed`; None if it does not exist.

        Raises:
            ShardCorrupt: the file is damaged or edited.
        """
        content = self.read(name)
        if content is None:
            return None
        try:
            return unseal(content)
        except ValueError as error:
            raise ShardCorrupt(
                f"{self._path(name)}: {error}; remove the folder {WORK_FOLDER} of the output and"
                " repeat the command"
            ) from error

    def write_sealed(self, name: str, fields: dict[str, Any]) -> None:
        """Writes a small JSON object with its hash."""
        self.write(name, seal(fields))

    def put(self, local: Path, name: str) -> None:
        """Copies a local file of any size; readers see all of it or nothing."""
        if not self.is_local:
            with open(local, "rb") as source:
                self._folder.write(name, lambda file: _copy(source, file))
            return
        path = self._path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = partial_name(path)
        try:
            shutil.copyfile(local, partial)
            _sync(partial)
            os.replace(partial, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(partial)

    @contextmanager
    def scratch(self, folder: str, name: str) -> Iterator[str]:
        """Yields the path of a local file to write and then `move`; removes what is left of it.

        Args:
            folder: Where the file lies if the output is local, so that it can be renamed.
            name: Start of its name.
        """
        if self.is_local:
            os.makedirs(self._path(folder), exist_ok=True)
            path = partial_name(self._path(f"{folder}/{name}"))
        else:
            handle, path = tempfile.mkstemp(prefix=f"{name}.")
            os.close(handle)
        try:
            yield path
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def move(self, scratch: str, name: str) -> None:
        """Gives a file of `scratch` its name.

        Raises:
            FileNotFoundError: another process removed the local file.
        """
        if self.is_local:
            os.replace(scratch, self._path(name))
        else:
            self.put(Path(scratch), name)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Returns the sizes of the entries of a folder by name; empty if there is none."""
        path = self._path(folder).rstrip("/")

        def request() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()  # other processes write here
            return self._fs.ls(path, detail=True)

        try:
            listed = self._call(request, path)
        except FileNotFoundError:
            return {}
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"] for entry in listed}

    def size(self, name: str) -> int | None:
        """Returns the size of a file, whatever the listings say; None if it does not exist."""
        path = self._path(name)

        def request() -> int:
            self._fs.invalidate_cache()
            return self._fs.info(path)["size"]

        try:
            return self._call(request, path)
        except FileNotFoundError:
            return None

    def remove(self, names: Iterable[str]) -> None:
        """Removes files; one that is gone is no error."""
        paths = [self._path(name) for name in names]
        if not paths:
            return
        if not self.is_local:
            with suppress(FileNotFoundError):
                self._call(lambda: self._fs.rm(paths), paths[0])  # stores take many at once
                return
        for path in paths:
            with suppress(FileNotFoundError):
                self._call(lambda path=path: self._fs.rm_file(path), path)

    def remove_folder(self, folder: str) -> None:
        """Removes a local folder if it is empty; stores have no folders."""
        if self.is_local:
            with suppress(OSError):
                os.rmdir(self._path(folder))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _call(self, request: Callable[[], Result], path: str) -> Result:
        # A local disk gives the same error again, and at once.
        return request() if self.is_local else self._retries.call(request, path)


def seal(fields: dict[str, Any]) -> bytes:
    """Returns a JSON object with a hash of its fields, so that no damaged one is ever used."""
    return json.dumps({**fields, SEAL: _digest(fields)}, indent=1).encode()


def unseal(content: bytes) -> dict[str, Any]:
    """Returns the fields of `seal`. Raises ValueError if they are not those that were written."""
    try:
        fields = json.loads(content)
        digest = fields.pop(SEAL)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"damaged, or of an earlier release: {error!r:.200}") from error
    if digest != _digest(fields):
        raise ValueError("damaged or edited: its sha256 differs from its content's")
    return fields


def _digest(fields: dict[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _copy(source: BinaryIO, file: Any) -> None:
    source.seek(0)  # an earlier attempt may have read a part
    shutil.copyfileobj(source, file, COPY_BYTES)


def _sync(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
