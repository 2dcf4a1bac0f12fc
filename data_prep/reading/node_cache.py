"""Cache of whole remote shards in a folder on the node's disk, shared by all its processes.

Each shard is downloaded once for all processes of the node. Files are named by their sha256, so
that data sets, runs and versions of a data set can share a folder. A download goes to a temporary
file, which is renamed once its checksum is verified. Locks are file locks (flock): the operating
system releases them when a process dies. The next process that needs space deletes the temporary
files of killed processes.

The cache touches only files in its folder that have such a name. It follows no symbolic link there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tvr.data_prep.dataset.index_rules import SHA256
from tvr.data_prep.dataset.manifest import Shard
from tvr.data_prep.reading.order import MIN_WINDOW_SHARDS
from tvr.data_prep.storage.storage import Storage

# Size of one request; a failed request is retried without downloading the shard from the start.
CHUNK_BYTES = 1 << 25
# A shard with a wrong checksum is not downloaded again for this long; the store may be repaired.
REJECTED_S = 3600.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFolder:
    """A local folder for shards of remote data sets."""

    path: str
    max_bytes: int
    """Limit for all files in the folder together."""


class ShardCache:
    """The shards of one data set in a cache folder, which any number of processes may share.

    Args:
        folder: Cache folder; created if missing.
        store: Storage of the data set.
        shards: Shards of the data set; shard numbers index this sequence.

    Raises:
        ValueError: the folder is too small for one window of shards, see `order`; or a sha256 is
            none.
    """

    def __init__(self, folder: CacheFolder, store: Storage, shards: Sequence[Shard]) -> None:
        for shard in shards:
            # It becomes the name of a file that may be replaced or removed.
            if SHA256.fullmatch(shard.sha256) is None:
                raise ValueError(
                    f"{shard.name}: sha256={shard.sha256!r} must be 64 lower-case hexadecimal"
                    " digits to name a file in the shard cache"
                )
        largest = sorted(shard.shard_bytes for shard in shards)[-MIN_WINDOW_SHARDS:]
        self.window_bytes = sum(largest)
        if folder.max_bytes < self.window_bytes:
            raise ValueError(
                f"the shard cache {folder.path} of {folder.max_bytes} bytes must hold at least"
                f" {self.window_bytes} bytes, because training reads {len(largest)} shards in turn;"
                " raise the limit (data.shard_cache_gib), or pack smaller shards"
            )
        self._folder = Path(folder.path)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._max_bytes = folder.max_bytes
        self._store = store
        self._shards = shards
        self._disk_failed = False

    def read(self, shard: int, offset: int, length: int) -> bytes | None:
        """Reads a byte range of a shard, which is downloaded first if it is not cached.

        Returns:
            The bytes, or None if the shard cannot be cached here.

        Raises:
            OSError: the store fails, see `Storage.read_range`.
        """
        for _ in range(2):
            try:
                # Opened for each read: an open file would occupy disk space after its removal.
                descriptor = _open(self._path(shard), os.O_RDONLY)
            except FileNotFoundError:
                if not self.fetch(shard):
                    return None
                continue
            try:
                os.utime(descriptor)  # marks the shard as the most recently used
                return os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        return None  # another process evicted the shard right after its download

    def has(self, shard: int) -> bool:
        """True if the shard is cached."""
        path = self._path(shard)
        return path.exists() and not path.is_symlink()

    def drop(self, shard: int) -> None:
        """Deletes a cached shard whose bytes are damaged."""
        self._path(shard).unlink(missing_ok=True)

    def fetch(
        self,
        shard: int,
        *,
        wait: bool = True,
        attempts: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Downloads a shard unless it is cached.

        Args:
            shard: Number of the shard.
            wait: Wait if another process is downloading the shard.
            attempts: Attempts per request; None = the store's default.
            stopped: Called between requests; True abandons the download.

        Returns:
            True if the shard is cached now. False if the store's copy has a wrong checksum, if
            there is no space, or if another process downloads it and `wait` is false.

        Raises:
            OSError: the store fails, see `Storage.read_range`.
        """
        if self.has(shard):
            return True
        if self._disk_failed or self._is_rejected(shard):
            return False
        partial = self._path(shard).with_suffix(".partial")
        descriptor = self._claim(partial, shard, wait)
        if descriptor is None:
            return self._path(shard).exists()
        published = False
        try:
            if self._reserve(descriptor, self._shards[shard].shard_bytes):
                published = self._download(descriptor, shard, attempts, stopped)
            if published:
                os.replace(partial, self._path(shard))
            return published
        finally:
            if not published:
                partial.unlink(missing_ok=True)
            _release(descriptor)

    def _path(self, shard: int) -> Path:
        return self._folder / f"{self._shards[shard].sha256}.tar"

    def _claim(self, partial: Path, shard: int, wait: bool) -> int | None:
        """Locks the temporary file of a shard.

        Returns None if the shard was published meanwhile, or if another process holds the lock and
        `wait` is false.
        """
        while not self._path(shard).exists():
            descriptor = _locked(partial, os.O_RDWR | os.O_CREAT, wait)
            if descriptor is None:
                if not wait:
                    return None
            elif self._path(shard).exists():
                partial.unlink(missing_ok=True)
                _release(descriptor)
            else:
                return descriptor
        return None

    def _reserve(self, descriptor: int, num_bytes: int) -> bool:
        """Evicts the least recently used shards, then reserves space by extending the file."""
        with self._folder_lock():
            reserved = self._delete_stale_partials()
            cached = sorted(self._files(".tar"), key=_last_use)
            used = reserved + sum(_size(path) for path in cached)
            if reserved + num_bytes > self._max_bytes:
                return False
            for path in cached:
                if used + num_bytes <= self._max_bytes:
                    break
                used -= _size(path)
                path.unlink(missing_ok=True)
            os.ftruncate(descriptor, num_bytes)
        return True

    def _files(self, suffix: str) -> list[Path]:
        """Files of the cache; others, even if they are tar archives, belong to the user."""
        found = self._folder.glob(f"*{suffix}")
        return [path for path in found if SHA256.fullmatch(path.stem) is not None]

    def _delete_stale_partials(self) -> int:
        """Deletes temporary files of dead processes; returns the bytes that live ones reserved."""
        reserved = 0
        for path in self._files(".partial"):
            # A live process holds the lock of its file.
            stale = _locked(path, os.O_RDWR, wait=False)
            if stale is not None:
                path.unlink()
                _release(stale)
            else:
                reserved += _size(path)
        return reserved

    def _download(
        self, descriptor: int, shard: int, attempts: int | None, stopped: Callable[[], bool]
    ) -> bool:
        """Downloads a shard into a file; False if stopped, unwritable, or of a wrong checksum."""
        name, end = self._shards[shard].name, self._shards[shard].shard_bytes
        digest = hashlib.sha256()
        for start in range(0, end, CHUNK_BYTES):
            if stopped():
                return False
            content = self._store.read_range(name, start, min(start + CHUNK_BYTES, end), attempts)
            digest.update(content)
            try:
                _write(descriptor, content, start)
            except OSError as error:
                self._disk_failed = True
                log.warning("%s: the shard cache is disabled: %s", self._folder, error)
                return False
        if digest.hexdigest() != self._shards[shard].sha256:
            self._reject(shard)
            return False
        os.fsync(descriptor)  # in a crash, a published name must not outlive its content
        return True

    def _reject(self, shard: int) -> None:
        descriptor = _open(self._rejection(shard), os.O_WRONLY | os.O_CREAT)
        os.utime(descriptor)
        os.close(descriptor)
        log.warning(
            "%s: the downloaded shard's sha256 differs from the manifest's; the shard is not"
            " cached, and its samples are read and checked one by one",
            self._store.path(self._shards[shard].name),
        )

    def _is_rejected(self, shard: int) -> bool:
        try:
            return time.time() - self._rejection(shard).lstat().st_mtime < REJECTED_S
        except FileNotFoundError:
            return False

    def _rejection(self, shard: int) -> Path:
        return self._path(shard).with_suffix(".refused")

    @contextmanager
    def _folder_lock(self) -> Iterator[None]:
        descriptor = _locked(self._folder / "lock", os.O_RDWR | os.O_CREAT, wait=True)
        assert descriptor is not None, "the lock file is never deleted"
        try:
            yield
        finally:
            _release(descriptor)


def _open(path: Path, flags: int) -> int:
    """Opens a file of the cache. A symbolic link in its place is removed, never followed.

    Raises:
        FileNotFoundError: there is no such file.
    """
    while True:
        try:
            return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if error.errno != errno.ELOOP or not path.is_symlink():
                raise
        path.unlink(missing_ok=True)


def _locked(path: Path, flags: int, wait: bool) -> int | None:
    """Opens and locks a file exclusively; None if it is locked, or is not the file at `path`."""
    try:
        descriptor = _open(path, flags)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)  # locked by another process, or renamed or deleted while waiting
    return None


def _release(descriptor: int) -> None:
    # Unlock explicitly: closing is not enough if a forked process holds a copy of the descriptor.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _write(descriptor: int, content: bytes, at: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _last_use(path: Path) -> tuple[int, str]:
    try:
        return path.lstat().st_mtime_ns, path.name
    except FileNotFoundError:
        return 0, path.name
