"""Reads shards from end to end in bounded memory, several at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

from tvr.data_prep.dataset.manifest import Manifest, Shard
from tvr.data_prep.dataset.sample_codec import parse_range
from tvr.data_prep.storage.storage import Storage

# One request of a scan; a shard in turn holds this much, or one sample where that is larger.
CHUNK_BYTES = 1 << 23
JOBS = 4

Result = TypeVar("Result")
Progress = Callable[[int, int], None]
"""Is told the bytes read so far and the bytes to read, from any thread, one call at a time."""


class ReadMeter:
    """Adds up what the threads of a scan read, until one of them fails."""

    def __init__(self, num_bytes: int, progress: Progress | None) -> None:
        self._num_bytes = num_bytes
        self._progress = progress
        self._read = 0
        self._stopped = False
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Ends every thread at its next `add`."""
        self._stopped = True

    def add(self, num_bytes: int) -> None:
        """Counts bytes that were read. Raises CancelledError after `stop`."""
        with self._lock:
            if self._stopped:
                raise CancelledError
            self._read += num_bytes
            if self._progress is not None:
                self._progress(self._read, self._num_bytes)


class SequentialShard:
    """A shard read by rising offsets; what lies before the last one is forgotten."""

    def __init__(self, store: Storage, shard: Shard, meter: ReadMeter, *, ahead: int) -> None:
        """`ahead` bytes from an offset are asked for at once, for the reads that follow."""
        self._store = store
        self._name = shard.name
        # One byte more than packed: a file that grew is seen, and no store is asked past the end.
        self._limit = shard.shard_bytes + 1
        self._meter = meter
        self._ahead = ahead
        self._start = 0
        self._held = b""
        self._ended = False

    def read(self, offset: int, length: int) -> bytes:
        """The range, or what there is of it. Raises as `Storage.read_range`."""
        skipped = offset - self._start
        if skipped + length > len(self._held) and not self._ended:
            self._held = self._held[skipped:]
            self._start, skipped = offset, 0
            self._fetch(offset + length)
        return self._held[skipped : skipped + length]

    def _fetch(self, stop: int) -> None:
        first = self._start + len(self._held)
        last = max(stop, min(self._start + self._ahead, self._limit))
        content = self._store.read_range(self._name, first, last)
        self._ended = len(content) < last - first
        self._meter.add(len(content))
        self._held += content


def read_members(file: SequentialShard, manifest: Manifest, row: int) -> dict[str, bytes]:
    """Checked members of a sample by extension. Raises BadSample, and as `Storage.read_range`."""
    offset, length = int(manifest.samples.offset[row]), int(manifest.samples.length[row])
    return parse_range(manifest, row, file.read(offset, length))


def map_shards(
    jobs: int, action: Callable[[int], Result], numbers: Sequence[int], meter: ReadMeter
) -> list[Result]:
    """The results of `action`, which reads by `meter`, for each number, in order, `jobs` at a time.

    Reading waits, and hashing lets go of the interpreter: threads suffice.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be 1 or more")
    executor = ThreadPoolExecutor(jobs, thread_name_prefix="scan")
    try:
        return list(executor.map(action, numbers))
    except BaseException:
        meter.stop()  # a shard may take minutes yet, and Ctrl-C is meant now
        raise
    finally:
        executor.shutdown(cancel_futures=True)
