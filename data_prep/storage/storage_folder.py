"""A folder in a local file system or any fsspec store, with durable writes and renames."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


class StorageFolder:
    """The folder at a URL; names are relative to it.

    On a local disk a write or a rename has reached the disk when it returns, so that it survives a
    power cut. Errors are not retried: the caller handles a failed write.
    """

    def __init__(self, url: str) -> None:
        self._fs: Any
        self._fs, self._root = url_to_fs(url)
        self.url = url
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Full path of a file, as the file system takes it and messages show it."""
        return f"{self._root.rstrip('/')}/{name}"

    def list_names(self, folder: str = "") -> list[str]:
        """Sorted names of the entries of a folder; empty if the folder does not exist."""
        try:
            # Some file systems cache listings, and other processes write here, too.
            self._fs.invalidate_cache()
            found = self._fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def read(self, name: str) -> bytes:
        """Content of a file."""
        return self._fs.cat_file(self.path(name))

    @contextmanager
    def open_read(self, name: str) -> Iterator[Any]:
        """Opens a file for binary reading."""
        with self._fs.open(self.path(name), "rb") as file:
            yield file

    @contextmanager
    def open_write(self, name: str) -> Iterator[Any]:
        """Opens a new file for binary writing; a local one is synced to disk at the end."""
        if not self.is_local:
            with self._fs.open(self.path(name), "wb") as file:
                yield file
            return
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def write_atomically(self, name: str, content: bytes) -> None:
        """Writes a small file in one step: readers see the old content or the new.

        The module-level atomic writers do not serve here: they leave out the two syncs, without
        which a manifest could survive a power cut that its checkpoint's files do not.
        """
        if not self.is_local:
            self._fs.pipe_file(self.path(name), content)  # one request, which stores make atomic
            return
        partial = f"{name}.partial"
        with self.open_write(partial) as file:
            file.write(content)
        os.replace(self.path(partial), self.path(name))
        _sync_folder(os.path.dirname(self.path(name)))

    def rename(self, old: str, new: str) -> None:
        """Renames a folder; on a local disk in one step.

        Raises:
            FileNotFoundError: another process removed it.
        """
        if not self.is_local:
            self._fs.mv(self.path(old), self.path(new), recursive=True)
            return
        os.rename(self.path(old), self.path(new))
        _sync_folder(os.path.dirname(self.path(new)))

    def remove(self, name: str) -> None:
        """Removes a file or folder if it exists.

        A local folder is first renamed, so that no reader finds it half removed.
        """
        path = self.path(name)
        if self.is_local and os.path.isdir(path):
            trash = self.path(f".{name}.trash-{os.getpid()}")
            try:
                os.rename(path, trash)
            except FileNotFoundError:
                return
            path = trash
        try:
            self._fs.rm(path, recursive=True)
        except FileNotFoundError:
            pass


def _sync_folder(path: str) -> None:
    """Syncs a folder's entries, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
