"""Byte ranges of a data set's shards: from local files, the node's shard cache, or the store."""

from __future__ import annotations

import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Sequence

from tvr.data_prep.dataset.manifest import Manifest
from tvr.data_prep.reading.locality import CacheNeed
from tvr.data_prep.reading.node_cache import CacheFolder, ShardCache
from tvr.data_prep.reading.prefetch import ShardPrefetcher
from tvr.data_prep.records import BadSample
from tvr.data_prep.storage.retries import LOCAL_ATTEMPTS, Retries
from tvr.data_prep.storage.storage import Storage
from tvr.data_prep.storage.storage_errors import is_passing_error

MAX_OPEN_SHARDS = 64


class ShardReader:
    """Reads byte ranges of shards.

    Local files stay open, because opening a file on a shared file system costs more than reading
    from it.

    Args:
        url: Folder or fsspec URL of the data set.
        manifest: Index of the data set.
        folder: Shard cache for a remote data set; None = read every range from the store.
        reads: Counter to update, by READ_SOURCES.
    """

    def __init__(
        self, url: str, manifest: Manifest, folder: CacheFolder | None, reads: Counter[str]
    ) -> None:
        self._reads = reads
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._prefetcher: ShardPrefetcher | None = None
        self._store = Storage(manifest.files_url(url))
        self._retries = Retries()
        self._manifest = manifest
        self._folder = folder
        self._cache: ShardCache | None = None
        self._owned: frozenset[int] | None = None  # until told otherwise, all shards
        if folder is not None and not self._store.is_local and manifest.beton is None:
            self._cache = ShardCache(folder, self._store, manifest.shards)

    @property
    def has_cache(self) -> bool:
        """True if whole shards are cached on this node."""
        return self._cache is not None

    def reserve(self, need: CacheNeed) -> bool:
        """Checks the cache's size; shards are downloaded ahead if it has room for them.

        Returns:
            True if shards are downloaded ahead.

        Raises:
            ValueError: see `CacheFolder.check`.
        """
        if self._cache is None or self._folder is None:
            return False
        if self._folder.check(need):
            self._prefetcher = ShardPrefetcher(self._cache)
        return self._prefetcher is not None

    def use(self, current: Sequence[int], upcoming: Sequence[int]) -> None:
        """Tells which shards this node owns, see `locality`; only these are downloaded whole.

        They are not evicted until the next call.

        Args:
            current: Shards that are read now.
            upcoming: Shards that are read next, to be downloaded ahead.
        """
        if self._cache is None:
            return
        self._owned = frozenset(current)
        if self._prefetcher is None:
            self._cache.pin(self._owned)
        else:
            self._cache.pin(self._owned.union(upcoming))
            self._prefetcher.prefetch(upcoming)

    def read(self, shard: int, offset: int, length: int, crc32: int, key: str) -> bytes:
        """Reads the byte range of sample `key`; a truncated file gives fewer bytes.

        A shard that this node does not own is not downloaded: unless it is cached, the range is
        read from the store. A range from the shard cache is compared with `crc32`: if it differs,
        the cached shard is dropped and the range is read from the store. A range from the store
        that differs is read once more, since a connection may have cut or damaged it. The caller
        checks the result.

        Raises:
            BadSample: the shard is missing ("missing_shard"), the storage refuses to deliver it
                ("read_error"), or the storage fails for the moment ("unavailable").
        """
        name = self._manifest.file_of_shard(shard).name
        try:
            if self._store.is_local:
                self._reads["local"] += 1
                return self._read_local(name, offset, length)
            if self._cache is not None:
                source = "shard_cache" if self._cache.has(shard) else "fetched"
                is_owned = self._owned is None or shard in self._owned
                content = self._cache.read(shard, offset, length, download=is_owned)
                if content is not None and zlib.crc32(content) == crc32:
                    self._reads[source] += 1
                    return content
                if content is not None:
                    self._cache.drop(shard)
            self._reads["store"] += 1
            content = self._store.read_range(name, offset, offset + length)
            if zlib.crc32(content) != crc32:
                content = self._store.read_range(name, offset, offset + length)
            return content
        except FileNotFoundError as error:
            raise BadSample(key, "missing_shard", self._store.path(name)) from error
        except OSError as error:
            # By cause: the storage or the network says nothing about the sample.
            reason = "unavailable" if is_passing_error(error) else "read_error"
            raise BadSample(key, reason, str(error)) from error

    def _read_local(self, name: str, offset: int, length: int) -> bytes:
        def pread() -> bytes:
            try:
                return os.pread(self._descriptor(name), length, offset)
            except OSError:
                # A network file system invalidates open files, for example when its server
                # restarts: the next attempt opens the file again.
                if name in self._descriptors:
                    os.close(self._descriptors.pop(name))
                raise

        try:
            return pread()
        except OSError:
            pass  # often a stale file, which needs no wait
        return self._retries.call(pread, self._store.path(name), LOCAL_ATTEMPTS)

    def _descriptor(self, name: str) -> int:
        # Forked workers may share a descriptor: pread does not move a file position.
        if name not in self._descriptors:
            if len(self._descriptors) >= MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[name] = os.open(self._store.path(name), os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.move_to_end(name)
        return self._descriptors[name]

    def __del__(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self._cache is not None:
            self._cache.unpin()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
