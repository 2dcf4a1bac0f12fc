"""Byte ranges of a data set's shards: from local files, the node's shard cache, or the store."""

from __future__ import annotations

import errno
import os
import zlib
from collections import Counter, OrderedDict

from tvr.data_prep.dataset.manifest import Manifest
from tvr.data_prep.reading.node_cache import CacheFolder, ShardCache
from tvr.data_prep.reading.prefetch import ShardPrefetcher
from tvr.data_prep.records import BadSample
from tvr.data_prep.storage.storage import Storage

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
        self.prefetcher: ShardPrefetcher | None = None
        self._store = Storage(url)
        self._manifest = manifest
        self._cache: ShardCache | None = None
        if folder is not None and not self._store.is_local and manifest.beton is None:
            self._cache = ShardCache(folder, self._store, manifest.shards)
            # In a smaller cache, prefetched shards would evict the ones in use.
            if folder.max_bytes >= 2 * self._cache.window_bytes:
                self.prefetcher = ShardPrefetcher(self._cache)

    def read(self, shard: int, offset: int, length: int, crc32: int, key: str) -> bytes:
        """Reads the byte range of sample `key`; a truncated file gives fewer bytes.

        A range from the shard cache is compared with `crc32`: if it differs, the cached shard is
        dropped and the range is read from the store. The caller checks all other ranges.

        Raises:
            BadSample: the shard is missing or cannot be read.
        """
        name = self._manifest.file_of_shard(shard).name
        try:
            if self._store.is_local:
                self._reads["local"] += 1
                return self._read_local(name, offset, length)
            if self._cache is not None:
                source = "shard_cache" if self._cache.has(shard) else "fetched"
                content = self._cache.read(shard, offset, length)
                if content is not None and zlib.crc32(content) == crc32:
                    self._reads[source] += 1
                    return content
                if content is not None:
                    self._cache.drop(shard)
            self._reads["store"] += 1
            return self._store.read_range(name, offset, offset + length)
        except FileNotFoundError as error:
            raise BadSample(key, "missing_shard", self._store.path(name)) from error
        except OSError as error:
            raise BadSample(key, "read_error", str(error)) from error

    def _read_local(self, name: str, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._descriptor(name), length, offset)
        except OSError as error:
            if error.errno != errno.ESTALE or name not in self._descriptors:
                raise
            # A network file system invalidates open files, for example when its server restarts.
            os.close(self._descriptors.pop(name))
            return os.pread(self._descriptor(name), length, offset)

    def _descriptor(self, name: str) -> int:
        # Forked workers may share a descriptor: pread does not move a file position.
        if name not in self._descriptors:
            if len(self._descriptors) >= MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[name] = os.open(self._store.path(name), os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.move_to_end(name)
        return self._descriptors[name]

    def __del__(self) -> None:
        if self.prefetcher is not None:
            self.prefetcher.close()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
