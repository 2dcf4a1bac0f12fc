"""Cache of whole remote shards in a folder on the node's disk, shared by all its processes.

Each shard is downloaded once for all processes of the node. Files are named by their sha256, so
that data sets, runs and versions of a data set can share a folder. A download goes to a temporary
file, which is renamed once its checksum is verified. `cache_folder` has the locks, the pins of
shards in use, and the eviction.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tvr.data_prep.dataset.index_rules import SHA256
from tvr.data_prep.dataset.manifest import Shard
from tvr.data_prep.reading.cache_folder import ShardFolder, locked, open_file, release, write
from tvr.data_prep.reading.locality import NOTHING_NEEDED, CacheNeed
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
    others: CacheNeed = NOTHING_NEEDED
    """What other data sets that are read at the same time need of the folder."""

    def check(self, need: CacheNeed) -> bool:
        """Checks that the folder can hold what is needed.

        Returns:
            True if it has room for prefetched shards as well.

        Raises:
            ValueError: it cannot hold the shards that are read at once.
        """
        total = need + self.others
        if self.max_bytes < total.least:
            raise ValueError(
                f"the shard cache {self.path} of {self.max_bytes} bytes must hold at least"
                f" {total.least} bytes, the shards that the ranks of a node read at once"
                f" ({total.full} with those that are downloaded ahead); raise the limit"
                f" (data.shard_cache_gib) to {-(-total.least >> 30)} or better"
                f" {-(-total.full >> 30)} GiB, or pack smaller shards"
            )
        return self.max_bytes >= total.full


class ShardCache:
    """The shards of one data set in a cache folder, which any number of processes may share.

    Args:
        folder: Cache folder; created if missing.
        store: Storage of the data set.
        shards: Shards of the data set; shard numbers index this sequence.

    Raises:
        ValueError: a sha256 is none.
    """

    def __init__(self, folder: CacheFolder, store: Storage, shards: Sequence[Shard]) -> None:
        for shard in shards:
            # It becomes the name of a file that may be replaced or removed.
            if SHA256.fullmatch(shard.sha256) is None:
                raise ValueError(
                    f"{shard.name}: sha256={shard.sha256!r} must be 64 lower-case hexadecimal"
                    " digits to name a file in the shard cache"
                )
        self._folder = ShardFolder(Path(folder.path), folder.max_bytes)
        self._store = store
        self._shards = shards
        self._disk_failed = False
        self._has_warned = False

    def read(self, shard: int, offset: int, length: int, *, download: bool = True) -> bytes | None:
        """Reads a byte range of a shard.

        Args:
            shard: Number of the shard.
            offset: First byte.
            length: Number of bytes.
            download: Download the shard first if it is not cached.

        Returns:
            The bytes, or None if the shard is not cached or cannot be.

        Raises:
            OSError: the store fails, see `Storage.read_range`.
        """
        for _ in range(2):
            try:
                # Opened for each read: an open file would occupy disk space after its removal.
                descriptor = open_file(self._path(shard), os.O_RDONLY)
            except FileNotFoundError:
                if not download or not self.fetch(shard):
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

    def pin(self, shards: Iterable[int]) -> None:
        """Keeps shards from eviction until this process pins others, unpins all, or ends."""
        if self._disk_failed:
            return
        try:
            self._folder.pin([self._shards[shard].sha256 for shard in shards])
        except OSError as error:
            self._disable(error)

    def unpin(self) -> None:
        """Gives up what this process has pinned."""
        self._folder.unpin()

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
            if self._folder.reserve(descriptor, self._shards[shard].shard_bytes):
                published = self._download(descriptor, shard, attempts, stopped)
            else:
                self._warn_full()
            if published:
                os.replace(partial, self._path(shard))
            return published
        finally:
            if not published:
                partial.unlink(missing_ok=True)
            release(descriptor)

    def _path(self, shard: int) -> Path:
        return self._folder.shard(self._shards[shard].sha256)

    def _claim(self, partial: Path, shard: int, wait: bool) -> int | None:
        """Locks the temporary file of a shard.

        Returns None if the shard was published meanwhile, or if another process holds the lock and
        `wait` is false.
        """
        while not self._path(shard).exists():
            descriptor = locked(partial, os.O_RDWR | os.O_CREAT, wait)
            if descriptor is None:
                if not wait:
                    return None
            elif self._path(shard).exists():
                partial.unlink(missing_ok=True)
                release(descriptor)
            else:
                return descriptor
        return None

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
                write(descriptor, content, start)
            except OSError as error:
                self._disable(error)
                return False
        if digest.hexdigest() != self._shards[shard].sha256:
            self._reject(shard)
            return False
        os.fsync(descriptor)  # in a crash, a published name must not outlive its content
        return True

    def _disable(self, error: OSError) -> None:
        self._disk_failed = True
        log.warning("%s: the shard cache is disabled: %s", self._folder.path, error)

    def _warn_full(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: shards in use, of other runs too, fill all %d bytes (data.shard_cache_gib);"
                " samples of further shards are read from the store one by one",
                self._folder.path,
                self._folder.max_bytes,
            )

    def _reject(self, shard: int) -> None:
        descriptor = open_file(self._rejection(shard), os.O_WRONLY | os.O_CREAT)
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
