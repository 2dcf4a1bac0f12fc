"""Reads through fsspec with retries (`retries`); writes atomically.

Only this sub-package knows about storage back-ends and their errors.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from typing import Any

import fsspec
from fsspec.core import OpenFile, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from tvr.data_prep.storage.retries import LOCAL_ATTEMPTS, Retries
from tvr.data_prep.storage.storage_errors import (
    StorageDenied,
    StorageUnavailable,
    is_storage_error,
    translate_error,
)

__all__ = [
    "Storage",
    "StorageDenied",
    "StorageUnavailable",
    "file_system",
    "open_file",
    "partial_name",
    "write_file",
]

PARTIAL_SUFFIX = ".partial"


class Storage:
    """Reads files below one URL: a local folder or any fsspec file system.

    An instance works in forked processes too.

    Args:
        retries: Repeats requests that fail for the moment; default: the usual waits.
    """

    def __init__(self, url: str, retries: Retries | None = None) -> None:
        self._url = url
        self._pid = os.getpid()
        self._fs: Any
        self._fs, self._root = file_system(url)
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.is_in_memory = isinstance(self._fs, MemoryFileSystem)
        self._retries = retries or Retries()

    @property
    def num_retries(self) -> int:
        """Retries of this instance so far."""
        return self._retries.count

    @property
    def root(self) -> str:
        """The URL's path, as the file system and error messages name it."""
        return self._root

    def path(self, name: str) -> str:
        """Returns the path of a file, as the file system and error messages name it."""
        return f"{self._root.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """Reads a whole file. Raises as `read_range`."""
        return self._read(self.path(name), None, None)

    def read_root(self) -> bytes:
        """Reads the file at the URL itself. Raises as `read_range`."""
        return self._read(self._root, None, None)

    def read_root_range(self, start: int, end: int) -> bytes:
        """Reads the bytes [start, end) of the file at the URL itself; fewer where it ends before.

        A store that ignores byte ranges gives the whole file. Raises as `read_range`.
        """
        return self._read(self._root, start, end)

    def read_range(self, name: str, start: int, end: int, attempts: int | None = None) -> bytes:
        """Reads the bytes [start, end) of a file; fewer where the file ends before `end`.

        Args:
            attempts: Attempts at an error that passes; None means `retries.ATTEMPTS`.

        Raises:
            FileNotFoundError: the file does not exist.
            StorageDenied: the store refuses the request, for example without credentials, or
                ignores byte ranges.
            StorageUnavailable: the store still fails for the moment after all retries.
        """
        path = self.path(name)
        content = self._read(path, start, end, attempts)
        if len(content) > end - start:
            raise StorageDenied(
                f"{path}: asked for {end - start} bytes, got {len(content)}: this store"
                " ignores byte ranges"
            )
        return content

    def _read(
        self, path: str, start: int | None, end: int | None, attempts: int | None = None
    ) -> bytes:
        def request() -> bytes:
            try:
                # open() would first request the size over HTTP, and report any failure of that
                # request as a missing file.
                return self._file_system().cat_file(path, start=start, end=end)
            except Exception as error:
                if is_storage_error(error) and translate_error(error).is_past_the_end:
                    return b""
                raise

        if attempts is None and self.is_local:
            attempts = LOCAL_ATTEMPTS
        return self._retries.call(request, path, attempts)

    def _file_system(self) -> Any:
        if self._pid != os.getpid():
            # Connections and event loops do not survive a fork; fsspec creates a new instance.
            self._fs, self._pid = file_system(self._url)[0], os.getpid()
        return self._fs


def is_chained(url: str) -> bool:
    """True for a chain of file systems, such as simplecache::s3://bucket/a.mp4.

    A name may contain "::" as well: in a chain, an address follows each of them.
    """
    return "::" in url and all("://" in part for part in url.split("::")[1:])


def file_system(url: str) -> tuple[Any, str]:
    """Returns the file system of a path or URL, and the path in it.

    A path without an address is a path of this machine, whatever characters it has.
    """
    if "::" not in url or is_chained(url):
        return url_to_fs(url)
    protocol = url.split("://", 1)[0] if "://" in url else "file"
    cls: Any = fsspec.get_filesystem_class(protocol)
    options = cls._get_kwargs_from_urls(url)
    return fsspec.filesystem(protocol, **options), cls._strip_protocol(url)


def open_file(url: str, mode: str = "rb", **options: Any) -> OpenFile:
    """Returns a file to open with `with`, as `fsspec.open` does, of a path or URL."""
    fs, path = file_system(url)
    return OpenFile(fs, path, mode, **options)


def partial_name(path: str) -> str:
    """Returns a temporary name for a file, different for each writer."""
    return f"{path}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"


def write_file(fs: Any, path: str, content: bytes) -> None:
    """Writes a file of an fsspec file system atomically.

    On a local disk the content goes to a temporary file in the same folder, which is then renamed
    to `path`. A store gets one request under the final name, which it makes atomic, with retries.
    """
    if not isinstance(fs, LocalFileSystem):
        Retries().call(lambda: fs.pipe_file(path, content), path)
        return
    partial = partial_name(path)
    try:
        fs.pipe_file(partial, content)
        fs.mv(partial, path)
    except BaseException:
        with suppress(OSError):
            fs.rm_file(partial)
        raise
