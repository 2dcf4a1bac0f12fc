"""Least-recently-used cache of decoded samples."""

from __future__ import annotations

from collections import OrderedDict

from tvr.data_prep.records import Sample


class DecodedSampleCache:
    """Keeps the most recently used samples, up to `max_bytes` of frames; 0 keeps none.

    Raises:
        ValueError: `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"cache_bytes={max_bytes} must be 0 (no cache) or more")
        self._max_bytes = max_bytes
        self._bytes = 0
        self._samples: OrderedDict[int, Sample] = OrderedDict()

    def get(self, row: int) -> Sample | None:
        """Returns the sample of a manifest row, if it is cached."""
        if row in self._samples:
            self._samples.move_to_end(row)
        return self._samples.get(row)

    def put(self, row: int, sample: Sample) -> None:
        """Adds a sample and evicts the least recently used ones beyond the limit."""
        self._samples[row] = sample
        self._bytes += sample.frames.nbytes
        while self._bytes > self._max_bytes:
            self._bytes -= self._samples.popitem(last=False)[1].frames.nbytes
