"""Downloads the shards that are needed next, in the background, into the node's shard cache."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence

from tvr.data_prep.reading.node_cache import ShardCache

THREAD_NAME = "shard-prefetch"

log = logging.getLogger(__name__)


class ShardPrefetcher:
    """Starts one prefetch thread per window of shards; the threads run one after another.

    No thread exists before the first call of `prefetch` or after `close`.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._requested: tuple[int, ...] = ()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._pid = os.getpid()

    def prefetch(self, shards: Sequence[int]) -> None:
        """Downloads these shards after those requested before; repeating a request is free."""
        if self._pid != os.getpid():
            # After a fork the thread exists in the parent only, and the event may have been locked
            # at the moment of the fork.
            self.__init__(self._cache)
        if tuple(shards) == self._requested or self._closed.is_set():
            return
        self._requested = tuple(shards)
        # A daemon thread: a loader worker exits without closing its reader. A partial download is
        # then cleaned up as after a kill.
        self._thread = threading.Thread(
            target=_fetch,
            args=(self._cache, self._requested, self._thread, self._closed),
            name=THREAD_NAME,
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Stops the thread and waits for it, for the length of one store request at most."""
        if self._pid != os.getpid() or self._thread is None:
            return
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None


def _fetch(
    cache: ShardCache,
    shards: Sequence[int],
    previous: threading.Thread | None,
    closed: threading.Event,
) -> None:
    if previous is not None:
        previous.join()
    for shard in shards:
        if closed.is_set():
            return
        try:
            # One attempt, and no waiting for a process that fetches the shard: it is not urgent.
            cache.fetch(shard, wait=False, attempts=1, stopped=closed.is_set)
        except OSError as error:
            log.debug("shard %d was not prefetched: %s", shard, error)
