"""Reads whole shards sequentially in bounded memory, several shards at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

from tvr.data_prep.dataset.manifest import Manifest, Shard
from tvr.data_prep.dataset.sample_codec import parse_range
from tvr.data_prep.storage.storage import Storage

# Size of one request. An open shard buffers this much, or one sample if that is larger.
CHUNK_BYTES = 1 << 23
JOBS = 4

Result = TypeVar("Result")
OnBytes = Callable[[int, int], None]
"""Called with the bytes read so far and the total; from any thread, one call at a time."""


class ReadMeter:
    """Counts the bytes that several threads read, and cancels the threads.

    Args:
        num_bytes: Total to read.
        on_bytes: Called after each read.
    """

    def __init__(self, num_bytes: int, on_bytes: OnBytes | None) -> None:
        self._num_bytes = num_bytes
        self._on_bytes = on_bytes
        self._read = 0
        self._is_cancelled = False
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Makes the next `add` of every thread raise CancelledError."""
        self._is_cancelled = True

    def add(self, num_bytes: int) -> None:
        """Counts bytes.

        Raises:
            CancelledError: `cancel` was called.
        """
        with self._lock:
            if self._is_cancelled:
                raise CancelledError
            self._read += num_bytes
            if self._on_bytes is not None:
                self._on_bytes(self._read, self._num_bytes)


class SequentialShard:
    """A shard that is read by increasing offsets; only the bytes from the last offset are kept.

    Args:
        store: Storage of the data set.
        shard: Shard to read.
        meter: Counts the bytes.
        read_ahead: Bytes to request at once from an offset, for the reads that follow.
    """

    def __init__(self, store: Storage, shard: Shard, meter: ReadMeter, *, read_ahead: int) -> None:
        self._store = store
        self._name = shard.name
        # One byte beyond the packed size: this detects a shard that grew without requesting a range
        # that starts beyond the end.
        self._limit = shard.shard_bytes + 1
        self._meter = meter
        self._read_ahead = read_ahead
        self._start = 0
        self._buffer = b""
        self._at_end = False

    def read(self, offset: int, length: int) -> bytes:
        """Reads a byte range; a truncated shard gives fewer bytes.

        Raises:
            OSError: see `Storage.read_range`.
        """
        skipped = offset - self._start
        if skipped + length > len(self._buffer) and not self._at_end:
            self._buffer = self._buffer[skipped:]
            self._start, skipped = offset, 0
            self._fetch(offset + length)
        return self._buffer[skipped : skipped + length]

    def _fetch(self, stop: int) -> None:
        first = self._start + len(self._buffer)
        last = max(stop, min(self._start + self._read_ahead, self._limit))
        content = self._store.read_range(self._name, first, last)
        self._at_end = len(content) < last - first
        self._meter.add(len(content))
        self._buffer += content


def read_members(file: SequentialShard, manifest: Manifest, row: int) -> dict[str, bytes]:
    """Reads a sample's members by file extension, and checks their bytes.

    Raises:
        BadSample: the bytes differ from what was packed.
        OSError: see `Storage.read_range`.
    """
    offset, length = int(manifest.samples.offset[row]), int(manifest.samples.length[row])
    return parse_range(manifest, row, file.read(offset, length))


def map_shards(
    jobs: int, action: Callable[[int], Result], numbers: Sequence[int], meter: ReadMeter
) -> list[Result]:
    """Applies `action` to each shard number, in `jobs` threads.

    Threads suffice: reading waits for the store, and hashing releases the interpreter lock.

    Args:
        jobs: Number of threads.
        action: Reads one shard; counts its bytes with `meter`.
        numbers: Shard numbers.
        meter: Cancelled if an action fails.

    Returns:
        The results in the order of `numbers`.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be 1 or more")
    executor = ThreadPoolExecutor(jobs, thread_name_prefix="shard-check")
    try:
        return list(executor.map(action, numbers))
    except BaseException:
        meter.cancel()  # a shard may need minutes, and Ctrl-C must end the command now
        raise
    finally:
        executor.shutdown(cancel_futures=True)
