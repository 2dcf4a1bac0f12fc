"""Chooses the frames to sample from a video or a span of it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

Span = tuple[float, float | None]
"""[start, end) in seconds from the first frame of a video; end None = end of the video."""


def segment_frames(
    total: int, num_wanted: int, offsets: Sequence[float] | None = None
) -> list[int]:
    """Chooses one index from each of `num_wanted` equal segments of range(total).

    Two segments share a frame if `total` is not a multiple of `num_wanted`, and both may choose it.

    Args:
        offsets: Position of each index within its segment, in [0, 1); default: the middle.

    Returns:
        The indices in ascending order; all of range(total) if `total` <= `num_wanted`.

    Raises:
        ValueError: `num_wanted` < 1, or `offsets` are out of range.
    """
    if num_wanted < 1:
        raise ValueError(f"num_frames={num_wanted} must be at least 1")
    fractions = (
        np.full(num_wanted, 0.5) if offsets is None else np.asarray(offsets, dtype=np.float64)
    )
    if fractions.shape != (num_wanted,) or not ((fractions >= 0) & (fractions < 1)).all():
        raise ValueError(f"offsets={offsets} must be {num_wanted} numbers, each in [0, 1)")
    if total <= num_wanted:
        return list(range(total))
    # Rounding may move an offset just below 1 to the next segment; the last one has no successor.
    indices = np.floor((np.arange(num_wanted) + fractions) * total / num_wanted).astype(int)
    return np.minimum(indices, total - 1).tolist()


def segment_centres(total: int, num_wanted: int) -> list[int]:
    """Chooses the middle index of each segment; all indices differ."""
    return segment_frames(total, num_wanted)


def check_span(span: Span | None) -> None:
    """Raises ValueError unless 0 <= start < end."""
    if span is None:
        return
    start_s, end_s = span
    if not (0 <= start_s < (math.inf if end_s is None else end_s)):
        raise ValueError(f"span={span} must be (start_s, end_s or None) with 0 <= start < end")


def frames_within(
    times_s: Sequence[float], span: Span | None, key: Callable[[int], float] | None = None
) -> range:
    """Returns the frames with a time in the span, compared in microseconds; `times_s` ascend.

    Args:
        key: Returns the time of a frame; `times_s` are then the frames, a range.
    """
    start_s, end_s = span or (0.0, None)
    first = bisect_left(times_s, round(start_s, 6), key=key)  # type: ignore[type-var]
    if end_s is None:
        return range(first, len(times_s))
    return range(first, bisect_left(times_s, round(end_s, 6), key=key))  # type: ignore[type-var]
