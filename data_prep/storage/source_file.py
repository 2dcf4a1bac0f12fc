"""Source files that are read once: small ones into memory, large ones as a file on a local disk.

A large file of this machine is used where it lies. A large file of a store is copied to TMPDIR. The
copy has no name, so the kernel removes it with the process, however that ends.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

from tvr.data_prep.storage.retries import LOCAL_ATTEMPTS, Retries
from tvr.data_prep.storage.storage import Storage
from tvr.data_prep.storage.storage_errors import StorageUnavailable

# One request each, so that a large file survives the time limit and the failure of a request.
REQUEST_BYTES = 1 << 24
# Larger files are not held in memory.
HELD_BYTES = 1 << 28
# Free space of TMPDIR that copies leave to others.
SPARE_BYTES = 1 << 28

FILE_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


class NotAFileError(OSError):
    """A path is no regular file; reading it could wait forever."""


class ChangedFileError(OSError):
    """A file was changed while it was read."""


@dataclass(slots=True)
class SourceFile:
    """A file that was read to its end."""

    num_bytes: int
    held: bytes | None = None
    """The content, if it is held in memory."""
    _file: BinaryIO | None = None
    _state: tuple[int, ...] = field(default=())

    @property
    def source(self) -> bytes | str:
        """The content, or a path without the file's name, which this process alone can open."""
        if self.held is not None:
            return self.held
        assert self._file is not None
        return f"/proc/self/fd/{self._file.fileno()}"

    def content(self) -> bytes:
        """Returns the content as bytes."""
        if self.held is not None:
            return self.held
        assert self._file is not None
        self._file.seek(0)
        return self._file.read()

    def check_unchanged(self) -> None:
        """Raises ChangedFileError if the file has changed since it was opened."""
        if self._file is not None and _state(self._file) != self._state:
            raise ChangedFileError("the file was changed while it was read")

    def close(self) -> None:
        """Frees the memory or the copy."""
        self.held = None
        if self._file is not None:
            self._file.close()


def read_source(
    url: str,
    *,
    on_part: Callable[[bytes], object],
    alive: Callable[[], object] = lambda: None,
    held_bytes: int | None = None,
) -> SourceFile:
    """Reads a file once, in parts.

    Args:
        url: Path or fsspec URL.
        on_part: Receives the content in order.
        alive: Called when a part has arrived and before a request is repeated.
        held_bytes: Larger files are not held in memory; default: HELD_BYTES.

    Raises:
        NotAFileError: the path is a FIFO, a device, a socket or a directory.
        ChangedFileError: the file was changed meanwhile.
        StorageUnavailable: the storage fails for the moment, or TMPDIR has no room.
        FileNotFoundError, StorageDenied: see `Storage.read_range`.
    """
    retries = Retries()
    sleep = retries.sleep

    def wait(wait_s: float) -> None:
        alive()
        sleep(wait_s)

    retries.sleep = wait
    storage = Storage(url, retries)
    limit = HELD_BYTES if held_bytes is None else held_bytes
    reader = _Reader(storage, retries, on_part, alive, limit)
    return reader.read_local() if storage.is_local else reader.read()


@dataclass(slots=True)
class _Reader:
    storage: Storage
    retries: Retries
    on_part: Callable[[bytes], object]
    alive: Callable[[], object]
    held_bytes: int

    def read_local(self) -> SourceFile:
        path = self.storage.root
        try:
            found = os.stat(path)
        except OSError:
            return self.read()  # which retries, and names the error
        kind = stat.S_IFMT(found.st_mode)
        if kind != stat.S_IFREG:
            raise NotAFileError(f"not a regular file but {FILE_KINDS.get(kind, 'another kind')}")
        if found.st_size <= self.held_bytes:
            content = self.storage.read_root()
            self.on_part(content)
            return SourceFile(len(content), content)
        file = self.retries.call(lambda: open(path, "rb"), path, LOCAL_ATTEMPTS)
        try:
            state, place = _state(file), 0
            while part := self._local_part(path, file.fileno(), place):
                self.on_part(part)
                place += len(part)
                self.alive()
            source = SourceFile(place, None, file, state)
            source.check_unchanged()
        except BaseException:
            file.close()
            raise
        return source

    def read(self) -> SourceFile:
        parts: list[bytes] = []
        file: BinaryIO | None = None
        place = 0
        try:
            while True:
                part = self.storage.read_root_range(place, place + REQUEST_BYTES)
                # A store that ignores byte ranges gives the whole file each time.
                is_last = len(part) != REQUEST_BYTES
                if place and len(part) > REQUEST_BYTES:
                    raise ChangedFileError("the store gave a range first, and then the whole file")
                if not place and not is_last:
                    is_last = len(self.storage.read_root_range(0, 1)) > 1
                self.alive()
                self.on_part(part)
                place += len(part)
                if file is None and place > self.held_bytes:
                    file = tempfile.TemporaryFile(prefix="tvr-source-")
                    for earlier in parts:
                        self._spool(file, earlier)
                    parts.clear()
                if file is None:
                    parts.append(part)
                else:
                    self._spool(file, part)
                if is_last:
                    break
            if file is None:
                return SourceFile(place, parts[0] if len(parts) == 1 else b"".join(parts))
            file.flush()
            return SourceFile(place, None, file, _state(file))
        except BaseException:
            if file is not None:
                file.close()
            raise

    def _local_part(self, path: str, file: int, place: int) -> bytes:
        return self.retries.call(lambda: os.pread(file, REQUEST_BYTES, place), path, LOCAL_ATTEMPTS)

    def _spool(self, file: BinaryIO, part: bytes) -> None:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if free < len(part) + SPARE_BYTES:
            raise StorageUnavailable(
                f"{self.storage.root}: no room for a copy of this large source in"
                f" TMPDIR={folder}: {free / 1e9:.3g} GB are free; set TMPDIR to a larger local disk"
            )
        file.write(part)


def _state(file: BinaryIO) -> tuple[int, ...]:
    found = os.fstat(file.fileno())
    return (found.st_size, found.st_mtime_ns)
