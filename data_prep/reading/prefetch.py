"""Fetches the next shards of the order in the background while those of this window are read."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence

from tvr.data_prep.reading.node_cache import ShardCache

log = logging.getLogger(__name__)


class ShardPrefetcher:
    """One thread for each window, one after another; none before the first call, nor after
    `close`."""

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._wanted: tuple[int, ...] = ()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._pid = os.getpid()

    def want(self, shards: Sequence[int]) -> None:
        """Starts on these shards after those wanted before; the same ones again cost nothing."""
        if self._pid != os.getpid():
            # The thread stayed behind in the parent, and its event may have been in use there.
            self.__init__(self._cache)
        if tuple(shards) == self._wanted or self._closed.is_set():
            return
        self._wanted = tuple(shards)
        # A daemon: a loader's worker ends without closing its reader. What it leaves half fetched
        # is as after a kill.
        self._thread = threading.Thread(
            target=_fetch,
            args=(self._cache, self._wanted, self._thread, self._closed),
            name="shards-ahead",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, after one request at most."""
        if self._pid != os.getpid() or self._thread is None:
            return
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None


def _fetch(
    cache: ShardCache,
    shards: Sequence[int],
    before: threading.Thread | None,
    closed: threading.Event,
) -> None:
    if before is not None:
        before.join()
    for shard in shards:
        if closed.is_set():
            return
        try:
            # One attempt, and no waiting for another process: this shard is not needed yet.
            cache.fetch(shard, wait=False, attempts=1, stopped=closed.is_set)
        except OSError as error:
            log.debug("shard %d not fetched ahead: %s", shard, error)
