"""The times of a video's frames, and which of the frames are sampled; numbers only, no videos."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from statistics import median_low
from typing import Literal, get_args

import numpy as np

Span = tuple[float, float | None]
"""[start, end) in seconds from the first frame of a video; end None = end of the video."""
FrameSpacing = Literal["time", "index"]
"""Frames are taken evenly in time, or evenly by their number."""

LONGEST_STEP_S = 30 * 3600
"""A longer step forward is no pause; ffmpeg takes the same number for an invalid time."""
WRAP_S = Fraction(1 << 33, 90_000)
"""Transport and program streams count 33 bits at 90 kHz, and then start again at 0."""
LONGEST_STEP_AT_WRAP_S = 10
NEW_START = 3
"""Frames whose stamps are given up rather than taking them for a new start of the count."""
EVEN = Fraction(1, 4)
"""Share of the mean step by which the frames of a constant rate may be off."""


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


def timed_frames(
    ticks: Sequence[int], num_wanted: int, offsets: Sequence[float] | None = None
) -> list[int]:
    """Chooses the frame that is shown at a position of each of `num_wanted` equal segments of time.

    A frame is shown until the next one. The last frame is shown as long as the shorter of the two
    frames before it. Frames of a constant rate are chosen as by `segment_frames`.

    Args:
        ticks: Times of the frames, strictly ascending.
        offsets: Position within each segment, in [0, 1); default: the middle.

    Returns:
        Indices in ascending order, some of them several times if few frames are shown for long;
        all frames if there are no more than `num_wanted`.

    Raises:
        ValueError: as `segment_frames`.
    """
    by_index = segment_frames(len(ticks), num_wanted, offsets)
    if len(ticks) <= num_wanted or is_constant(ticks):
        return by_index
    times = np.asarray(ticks, dtype=np.int64)
    times -= times[0]
    duration = int(times[-1] + np.diff(times[-3:]).min())
    shares = np.full(num_wanted, 0.5) if offsets is None else np.asarray(offsets, dtype=np.float64)
    moments = (np.arange(num_wanted) + shares) * duration / num_wanted
    chosen = np.searchsorted(times, moments, side="right") - 1
    return chosen.tolist()


def is_constant(ticks: Sequence[int]) -> bool:
    """True if no frame is off an even spacing by more than a tick or a quarter of the mean step.

    A container rounds times to its ticks, and some writers to coarser ones before.
    """
    if len(ticks) < 3:
        return True
    steps = len(ticks) - 1
    times = np.asarray(ticks, dtype=np.int64)
    times = times - times[0]
    whole = int(times[-1])
    # All exact: off by (times * steps - index * whole) / steps ticks.
    if whole * steps >= 1 << 62:
        return False
    off = np.abs(times * steps - np.arange(len(ticks)) * whole).max()
    return int(off) <= max(Fraction(steps), whole * EVEN)


def check_spacing(spacing: str, name: str) -> None:
    """Raises ValueError unless `spacing` is a FrameSpacing; `name` is the setting."""
    if spacing not in get_args(FrameSpacing):
        raise ValueError(f"{name}={spacing!r} must be {' or '.join(get_args(FrameSpacing))}")


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
    times_s: Sequence[float],
    span: Span | None,
    key: Callable[[int], float] | None = None,
    last_shown_s: float = 0.0,
) -> range:
    """Returns the frames with a time in the span, compared in microseconds; `times_s` ascend.

    A span between the times of two frames holds the frame that is shown then.

    Args:
        key: Returns the time of a frame; `times_s` are then the frames, a range.
        last_shown_s: Seconds for which the last frame is shown.
    """
    start_s, end_s = span or (0.0, None)
    start_s = round(start_s, 6)
    num_frames = len(times_s)
    first = bisect_left(times_s, start_s, key=key)  # type: ignore[type-var]
    end = num_frames
    if end_s is not None:
        end = bisect_left(times_s, round(end_s, 6), key=key)  # type: ignore[type-var]
    if 0 < first == end:
        last_s = times_s[-1] if key is None else key(num_frames - 1)
        if end < num_frames or start_s < round(last_s + last_shown_s, 6):
            return range(first - 1, end)
    return range(first, end)


def mend_stamps(
    stamps: Sequence[int | None], unit_s: Fraction, rate_hz: Fraction
) -> tuple[int, ...] | None:
    """Returns strictly ascending times of frames in the order in which they are shown.

    Good stamps stay as they are. A stamp is bad if it is missing, or would have to be left out so
    that as many as possible of the others ascend. A bad one becomes the one before plus the usual
    step, or less if the next good one is near. If the stamps of many frames go back, or jump by
    more than LONGEST_STEP_S, the count has started anew: these continue with the usual step, or as
    a count of 33 bits continues.

    Args:
        stamps: Time stamps in units of `unit_s`; None = missing.
        rate_hz: Frame rate for a video without two stamps that ascend.

    Returns:
        One time a frame; None if all stamps are missing.
    """
    known = [(frame, stamp) for frame, stamp in enumerate(stamps) if stamp is not None]
    if not known:
        return None
    longest = int(LONGEST_STEP_S / unit_s)
    pairs = list(pairwise(known))
    steps = [
        (second - first) // (later - earlier)
        for (earlier, first), (later, second) in pairs
        if 0 < second - first <= longest
    ]
    if len(steps) == len(stamps) - 1:
        return tuple(stamp for _, stamp in known)
    usual = max(1, median_low(steps) if steps else round(1 / (rate_hz * unit_s)))
    kept = _ascending([stamp for _, stamp in known], longest)
    return _fill([known[at] for at in kept], len(stamps), usual, unit_s)


def _fill(
    kept: Sequence[tuple[int, int]], num_frames: int, usual: int, unit_s: Fraction
) -> tuple[int, ...]:
    """Returns the times of all frames from the (frame, stamp) of those that are kept.

    There must be room for a tick for each frame; where there is none, later stamps move.
    """
    longest, shift = int(LONGEST_STEP_S / unit_s), 0
    frame, stamp = kept[0]
    times = [stamp - usual * (frame - before) for before in range(frame + 1)]
    for (frame, stamp), (later, raw) in pairwise(kept):
        missing = later - frame
        if not 0 < raw - stamp <= longest:
            unwrapped = raw - stamp + round(WRAP_S / unit_s)
            is_wrap = missing <= unwrapped <= LONGEST_STEP_AT_WRAP_S * missing / unit_s
            shift = times[-1] + (unwrapped if is_wrap else usual * missing) - raw
        end = max(raw + shift, times[-1] + missing)
        shift = end - raw
        room = end - times[-1]
        start = times[-1]
        times += [start + min(usual * i, room * i // missing) for i in range(1, missing)]
        times.append(end)
    times += [times[-1] + usual * i for i in range(1, num_frames - len(times) + 1)]
    return tuple(times)


def _ascending(stamps: Sequence[int], longest: int) -> list[int]:
    """Returns the places of as many stamps as possible that ascend by at most `longest` each.

    The count may start anew at any place, at the price of NEW_START stamps. Of equal stamps the
    first one is taken.
    """
    values = sorted(set(stamps))
    size, num = len(values), len(stamps)
    # The best chain that ends at each value, and a tree of the maxima over ranges of values. A
    # chain is one number: its stamps, then its last place, where an earlier one is better.
    tree = [0] * (2 * size)
    best, before = 0, list[int]()
    for place, stamp in enumerate(stamps):
        at = bisect_left(values, stamp) + size
        joined, low, high = 0, bisect_left(values, stamp - longest) + size, at
        while low < high:
            if low & 1:
                joined, low = max(joined, tree[low]), low + 1
            if high & 1:
                high -= 1
                joined = max(joined, tree[high])
            low, high = low // 2, high // 2
        chain = max(joined, best - NEW_START * num, 0)
        count = -(-chain // num)
        before.append(count * num - chain if count else -1)
        entry = (count + 1) * num - place
        best = max(best, entry)
        while at and entry > tree[at]:
            tree[at] = entry
            at //= 2
    places, at = list[int](), -best % num
    while at >= 0:
        places.append(at)
        at = before[at]
    return places[::-1]
