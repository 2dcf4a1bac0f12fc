"""Byte ranges of a data set's shards: local, from the node's cache, or from the store."""

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
    """Byte ranges of shards. Local files stay open: on shared file systems opening costs more than
    reading."""

    def __init__(self, url: str, manifest: Manifest, folder: CacheFolder | None) -> None:
        self.reads: Counter[str] = Counter()
        """By READ_SOURCES."""
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self.ahead: ShardPrefetcher | None = None
        self._store = Storage(url)
        self._manifest = manifest
        self._cache: ShardCache | None = None
        if folder is not None and not self._store.is_local and manifest.beton is None:
            self._cache = ShardCache(folder, self._store, manifest.shards)
            # With less room the next shards would push out those being read.
            if folder.max_bytes >= 2 * self._cache.window_bytes:
                self.ahead = ShardPrefetcher(self._cache)

    def read(self, shard: int, offset: int, length: int, crc32: int, key: str) -> bytes:
        """The range, or what there is of it. Only a copy in the cache is checked against `crc32`,
        since the store may have better bytes."""
        name = self._manifest.file_of_shard(shard).name
        try:
            if self._store.is_local:
                self.reads["local"] += 1
                return self._read_local(name, offset, length)
            if self._cache is not None:
                source = "shard_cache" if self._cache.has(shard) else "fetched"
                content = self._cache.read(shard, offset, length)
                if content is not None and zlib.crc32(content) == crc32:
                    self.reads[source] += 1
                    return content
                if content is not None:
                    self._cache.drop(shard)
            self.reads["store"] += 1
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
            # A network file system forgot the open file, for example after its server restarted.
            os.close(self._descriptors.pop(name))
            return os.pread(self._descriptor(name), length, offset)

    def _descriptor(self, name: str) -> int:
        # Safe to share with forked workers: pread has no file position.
        if name not in self._descriptors:
            if len(self._descriptors) >= MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[name] = os.open(self._store.path(name), os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.move_to_end(name)
        return self._descriptors[name]

    def __del__(self) -> None:
        if self.ahead is not None:
            self.ahead.close()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
