"""A folder in a local file system or any fsspec store, with whole and durable writes.

There are no renames of folders, since stores have none. A file appears under its name once it is
whole: on a local disk it is written beside its name, synced and renamed; a store makes an object
visible when its upload is complete. Requests to a store are retried as `retries` says.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from tvr.data_prep.storage.retries import Retries
from tvr.data_prep.storage.storage import PARTIAL_SUFFIX, Storage, partial_name
from tvr.data_prep.storage.storage_errors import is_storage_error, translate_error

LOCAL_READ_BYTES = 1 << 22
# One request each.
STORE_READ_BYTES = 1 << 24
PRECONDITION_FAILED = 412
NOT_IMPLEMENTED = 501
# What a client without the argument raises.
CLIENT_CANNOT = (TypeError, NotImplementedError)
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class StorageFolder:
    """The folder at a URL; names are relative to it.

    On a local disk a write or a removal has reached the disk when it returns, so that it survives a
    power cut, and its errors are raised at once. A store's errors are FileNotFoundError,
    StorageDenied and StorageUnavailable, the last one after all retries.
    """

    def __init__(self, url: str) -> None:
        self._fs: Any
        self._fs, self._root = url_to_fs(url)
        self.url = url
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self._reader = Storage(url)
        self._retries = Retries()
        self._can_create = True
        """False once the store has refused to write a file only if there is none."""

    def path(self, name: str) -> str:
        """Full path of a file, as the file system takes it and messages show it."""
        return f"{self._root.rstrip('/')}/{name}"

    def list_names(self, folder: str = "") -> list[str]:
        """Sorted names of the entries of a folder; empty if the folder does not exist.

        A store's listing may be out of date: only `read` tells whether a file exists.
        """

        def request() -> list[str]:
            try:
                # Some file systems cache listings, and other processes write here, too.
                self._fs.invalidate_cache()
                return self._fs.ls(self.path(folder), detail=False)
            except FileNotFoundError:
                return []

        found = self._call(request, folder)
        return sorted({path.rstrip("/").rsplit("/", 1)[-1] for path in found})

    def read(self, name: str) -> bytes:
        """Content of a file."""
        return self._fs.cat_file(self.path(name)) if self.is_local else self._reader.read(name)

    def read_chunks(self, name: str) -> Iterator[bytes]:
        """The content of a large file, from front to back; a store's chunks are retried one by one.

        Raises:
            FileNotFoundError: the file does not exist; with the first chunk.
        """
        if self.is_local:
            with open(self.path(name), "rb") as file:
                while content := file.read(LOCAL_READ_BYTES):
                    yield content
            return
        start, is_end = 0, False
        while not is_end:
            content = self._reader.read_range(name, start, start + STORE_READ_BYTES)
            start += len(content)
            is_end = len(content) < STORE_READ_BYTES
            if content:
                yield content

    @contextmanager
    def open_write(self, name: str) -> Iterator[Any]:
        """Opens a file for binary writing; it appears, whole, if the block ends without an error.

        The caller handles a failed write, see `write` for one with retries.
        """
        if self.is_local:
            changed = _make_folders(os.path.dirname(self.path(name)))
            partial = self.path(f"{name}{PARTIAL_SUFFIX}")
            with _open_partial(partial) as file:
                yield file
            os.replace(partial, self.path(name))
            _sync_folders(changed)
            return
        file = self._fs.open(self.path(name), "wb")
        try:
            yield file
            file.close()
        except BaseException:
            # Closing the file would complete the upload of the part that is written.
            with suppress(Exception):
                file.discard()
            with suppress(AttributeError):
                file.closed = True
            raise

    def write(self, name: str, write_to: Callable[[Any], Result]) -> Result:
        """Writes a file by a function that gets the open file, again from the start if it fails.

        Args:
            write_to: May be called several times; the value of the last call is returned.
        """

        def request() -> Result:
            try:
                with self.open_write(name) as file:
                    return write_to(file)
            except Exception as error:
                first = _storage_error(error)
                if first is None or first is error:
                    raise
                raise first from first.__cause__  # which names the store's answer

        return self._call(request, name)

    def write_atomically(self, name: str, content: bytes) -> None:
        """Writes a small file in one step: readers see the old content or the new.

        The module-level atomic writers do not serve here: they leave out the two syncs, without
        which a manifest could survive a power cut that its checkpoint's files do not.
        """
        if self.is_local:
            self.write(name, lambda file: file.write(content))
        else:
            # One request, which stores make atomic.
            self._call(lambda: self._fs.pipe_file(self.path(name), content), name)

    def create(
        self, name: str, content: bytes, before: Callable[[], object] = lambda: None
    ) -> None:
        """Writes a small file in one step, and only if there is none of this name.

        Args:
            before: Called right before each attempt; its error ends the call.

        Raises:
            FileExistsError: there is a file with other content.
        """

        def request() -> bool:
            before()
            return self._create_local(name, content) if self.is_local else self._put(name, content)

        # An answer that was lost makes the next attempt find its own file.
        if not self._call(request, name) and self.read(name) != content:
            raise FileExistsError(f"{self.path(name)} exists")

    def remove_file(self, name: str, before: Callable[[], object] = lambda: None) -> None:
        """Removes a file by its name, whatever the listings say, if it exists.

        Args:
            before: Called right before each attempt; its error ends the call.
        """

        def request() -> None:
            before()
            self._fs.rm_file(self.path(name))
            if self.is_local:
                _sync_folders([os.path.dirname(self.path(name))])

        with suppress(FileNotFoundError):
            self._call(request, name)

    def remove(self, name: str, before: Callable[[], object] = lambda: None) -> None:
        """Removes a file, or a folder with all that its listing shows, if it exists.

        Args:
            before: As for `remove_file`.
        """

        def request() -> None:
            before()
            self._fs.invalidate_cache()
            self._fs.rm(self.path(name), recursive=True)

        with suppress(FileNotFoundError):
            self._call(request, name)

    def remove_empty(self, name: str) -> None:
        """Removes a local folder if it is empty; stores have no folders."""
        if self.is_local:
            with suppress(OSError):
                os.rmdir(self.path(name))

    def _call(self, function: Callable[[], Result], name: str) -> Result:
        if self.is_local:
            return function()
        return self._retries.call(function, self.path(name))

    def _create_local(self, name: str, content: bytes) -> bool:
        path = self.path(name)
        # A name of its own: a writer that shared it could change the file after the link.
        partial = partial_name(path)
        changed = _make_folders(os.path.dirname(path))
        with _open_partial(partial) as file:
            file.write(content)
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            if self._can_create:
                log.warning("%s: no hard links here (%s): a file may be replaced", path, error)
            self._can_create = False
            if os.path.exists(path):
                return False
            os.replace(partial, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(partial)
        _sync_folders(changed)
        return True

    def _put(self, name: str, content: bytes) -> bool:
        """One request that creates an object; False if there is one already."""
        path = self.path(name)
        if self._can_create:
            try:
                self._fs.pipe_file(path, content, mode="create")
                return True
            except FileExistsError:
                return False
            except Exception as error:
                status = translate_error(error).status if is_storage_error(error) else None
                if status == PRECONDITION_FAILED:
                    return False
                if status != NOT_IMPLEMENTED and not isinstance(error, CLIENT_CANNOT):
                    raise
                log.warning("%s: this store cannot refuse to replace a file: %s", path, error)
            self._can_create = False
        self._fs.pipe_file(path, content)
        return True


@contextmanager
def _open_partial(path: str) -> Iterator[Any]:
    """A local file that is synced at the end, and removed after an error."""
    try:
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise


def _storage_error(error: BaseException) -> BaseException | None:
    """The storage error behind an error: torch raises another one as it closes the file."""
    current: BaseException | None = error
    while current is not None and not is_storage_error(current):
        current = current.__context__
    return current


def _make_folders(folder: str) -> list[str]:
    """Makes a local folder; returns the folders whose entries change with a new file in it."""
    changed, missing = [folder], folder
    while not os.path.exists(missing):
        missing = os.path.dirname(missing)
        changed.append(missing)
    os.makedirs(folder, exist_ok=True)
    return changed


def _sync_folders(folders: list[str]) -> None:
    """Syncs the entries of folders, so that a new or renamed file survives a power cut."""
    for folder in folders:
        # Another process may remove an emptied folder; one above the root may not be readable.
        with suppress(FileNotFoundError, PermissionError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
