"""Which frames of a video, or of a span of it, are taken."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

Span = tuple[float, float | None]
"""[start, end) in seconds from the first frame of a video; None: to its end."""


def segment_frames(
    total: int, num_wanted: int, offsets: Sequence[float] | None = None
) -> list[int]:
    """One index out of each of `num_wanted` equal segments of range(total); all where fewer.

    Index i lies at the share `offsets[i]` in [0, 1) of segment i, by default at its middle. Where
    `total` is no multiple of `num_wanted`, segments share a frame, and both may name it.
    """
    if num_wanted < 1:
        raise ValueError(f"num_frames={num_wanted} must be at least 1")
    shares = np.full(num_wanted, 0.5) if offsets is None else np.asarray(offsets, dtype=np.float64)
    if shares.shape != (num_wanted,) or not ((shares >= 0) & (shares < 1)).all():
        raise ValueError(f"offsets={offsets} must be {num_wanted} numbers, each in [0, 1)")
    if total <= num_wanted:
        return list(range(total))
    # A share just below 1 may be rounded up to the next segment: after the last there is none.
    indices = np.floor((np.arange(num_wanted) + shares) * total / num_wanted).astype(int)
    return np.minimum(indices, total - 1).tolist()


def segment_centres(total: int, num_wanted: int) -> list[int]:
    """`segment_frames` at the middles; no two are equal."""
    return segment_frames(total, num_wanted)


def check_span(span: Span | None) -> None:
    """Raises ValueError unless 0 <= start < end."""
    if span is None:
        return
    start_s, end_s = span
    if not (0 <= start_s < (math.inf if end_s is None else end_s)):
        raise ValueError(f"span={span} must be (start_s, end_s or None) with 0 <= start < end")


def frames_within(times_s: Sequence[float], span: Span | None) -> range:
    """The frames whose time, to the microsecond, lies in the span; `times_s` ascend."""
    start_s, end_s = span or (0.0, None)
    first = bisect_left(times_s, round(start_s, 6))
    return range(first, len(times_s) if end_s is None else bisect_left(times_s, round(end_s, 6)))
