"""Whole shards of a remote data set in a local folder, fetched once for all processes of a node.

Files are named by their sha256, so that data sets, runs and versions of a data set share a folder.
A shard is written under a temporary name and published by renaming once its checksum is right. The
locks are the system's, which it drops when their holder dies; what a killed process leaves behind
is removed by the next one that needs room.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tvr.data_prep.dataset.manifest import Shard
from tvr.data_prep.reading.order import WINDOW_SHARDS
from tvr.data_prep.storage.storage import Storage

# One request; a shard that breaks off is asked again from there.
CHUNK_BYTES = 1 << 25
# How long a shard with a wrong checksum is not fetched again: its store may be repaired.
REFUSED_S = 3600.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFolder:
    """Where shards of remote data sets are kept, and how many bytes of them."""

    path: str
    max_bytes: int


class ShardCache:
    """The shards of one data set in a folder that any number of processes share."""

    def __init__(self, folder: CacheFolder, store: Storage, shards: Sequence[Shard]) -> None:
        """Raises ValueError where the folder cannot hold the shards that are read in turns."""
        largest = sorted(shard.shard_bytes for shard in shards)[-WINDOW_SHARDS:]
        self.window_bytes = sum(largest)
        if folder.max_bytes < self.window_bytes:
            raise ValueError(
                f"the shard cache {folder.path} of {folder.max_bytes} bytes must hold"
                f" {self.window_bytes}: samples come from {len(largest)} shards in turns; allow"
                " more (data.shard_cache_gib), or pack smaller shards"
            )
        self._folder = Path(folder.path)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._max_bytes = folder.max_bytes
        self._store = store
        self._shards = shards
        self._disk_failed = False

    def read(self, shard: int, offset: int, length: int) -> bytes | None:
        """A range of a shard, which is fetched first if need be; None where it cannot be kept here.

        Raises as `Storage.read_range`.
        """
        for _ in range(2):
            try:
                # Opened for each read: a file held open keeps its room after it was removed.
                descriptor = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if not self.fetch(shard):
                    return None
                continue
            try:
                os.utime(descriptor)  # used last now
                return os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        return None  # fetched and removed at once: others need the room more

    def has(self, shard: int) -> bool:
        """Whether the shard is here."""
        return self._path(shard).exists()

    def drop(self, shard: int) -> None:
        """Removes a shard whose copy here turned out to be damaged."""
        self._path(shard).unlink(missing_ok=True)

    def fetch(
        self,
        shard: int,
        *,
        wait: bool = True,
        attempts: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Whether the shard is here now. It is not where its checksum is wrong at the store, where
        there is no room, or where another process fetches it and `wait` is false.

        Raises as `Storage.read_range`.
        """
        if self.has(shard):
            return True
        if self._disk_failed or self._is_refused(shard):
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
        """A locked descriptor of the temporary file; None where the shard came meanwhile, or will
        come from another process that is not waited for."""
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
        """Makes room by removing what was used least recently, and takes it by the file's size."""
        with self._alone():
            claimed = 0
            for path in self._folder.glob("*.partial"):
                # Only a dead process's file can be locked here.
                dead = _locked(path, os.O_RDWR, wait=False)
                if dead is not None:
                    path.unlink()
                    _release(dead)
                else:
                    claimed += _size(path)
            kept = sorted(self._folder.glob("*.tar"), key=_last_use)
            used = claimed + sum(_size(path) for path in kept)
            if claimed + num_bytes > self._max_bytes:
                return False
            for path in kept:
                if used + num_bytes <= self._max_bytes:
                    break
                used -= _size(path)
                path.unlink(missing_ok=True)
            os.ftruncate(descriptor, num_bytes)
        return True

    def _download(
        self, descriptor: int, shard: int, attempts: int | None, stopped: Callable[[], bool]
    ) -> bool:
        """Whether the whole shard arrived with the right checksum and could be written."""
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
                log.warning("%s: shards are no longer kept here: %s", self._folder, error)
                return False
        if digest.hexdigest() != self._shards[shard].sha256:
            self._refuse(shard)
            return False
        os.fsync(descriptor)  # a name must not outlive its content when the machine fails
        return True

    def _refuse(self, shard: int) -> None:
        self._refusal(shard).touch()
        log.warning(
            "%s: sha256 on arrival differs from the manifest's; not kept, its samples are read and"
            " checked one by one",
            self._store.path(self._shards[shard].name),
        )

    def _is_refused(self, shard: int) -> bool:
        try:
            return time.time() - self._refusal(shard).stat().st_mtime < REFUSED_S
        except FileNotFoundError:
            return False

    def _refusal(self, shard: int) -> Path:
        return self._path(shard).with_suffix(".refused")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        descriptor = _locked(self._folder / "lock", os.O_RDWR | os.O_CREAT, wait=True)
        assert descriptor is not None, "nothing removes this file"
        try:
            yield
        finally:
            _release(descriptor)


def _locked(path: Path, flags: int, wait: bool) -> int | None:
    """An exclusively locked descriptor of the file now at `path`, or None."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)  # held by another process, or renamed or removed while we waited
    return None


def _release(descriptor: int) -> None:
    # Unlocked by name: a process forked meanwhile holds a copy of the descriptor.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _write(descriptor: int, content: bytes, at: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _last_use(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except FileNotFoundError:
        return 0, path.name
