"""Where checkpoints lie: a local folder or any fsspec URL, with the few verbs that saving needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


class Place:
    """The folder of a run's checkpoints. Paths are relative to it."""

    def __init__(self, url: str) -> None:
        self._fs: Any
        self._fs, self._root = url_to_fs(url)
        self.url = url
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """As the file system wants it, and as messages show it."""
        return f"{self._root.rstrip('/')}/{name}"

    def names(self, folder: str = "") -> list[str]:
        """What lies in a folder, sorted; nothing where there is none."""
        try:
            # Listings are cached by some file systems, and other processes write here too.
            self._fs.invalidate_cache()
            found = self._fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def read(self, name: str) -> bytes:
        return self._fs.cat_file(self.path(name))

    @contextmanager
    def reading(self, name: str) -> Iterator[Any]:
        with self._fs.open(self.path(name), "rb") as file:
            yield file

    @contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """A new file; on a local disk it has reached the disk when the block ends."""
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

    def write_whole(self, name: str, content: bytes) -> None:
        """A small file that is seen complete or not at all."""
        if not self.is_local:
            self._fs.pipe_file(self.path(name), content)  # one request; stores make it atomic
            return
        aside = f"{name}.partial"
        with self.writing(aside) as file:
            file.write(content)
        os.replace(self.path(aside), self.path(name))
        _sync_folder(os.path.dirname(self.path(name)))

    def rename(self, old: str, new: str) -> None:
        """A folder's new name; on a local disk in one step.

        Raises FileNotFoundError where somebody else removed it.
        """
        if not self.is_local:
            self._fs.mv(self.path(old), self.path(new), recursive=True)
            return
        os.rename(self.path(old), self.path(new))
        _sync_folder(os.path.dirname(self.path(new)))

    def remove(self, name: str) -> None:
        """A file or folder, if it is there. A folder disappears from its name first."""
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
    """Makes a rename outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
