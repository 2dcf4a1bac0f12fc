"""How the values of one property are spread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_BINS = 40
# Values above this many times the 99th percentile are left out of the bins: one clip of an hour
# would put all others into the first.
FAR_OUT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Summary and histogram of one value or more."""

    count: int
    least: float
    median: float
    mean: float
    p95: float
    """95th percentile, linear between values, as the median."""
    most: float
    edges: tuple[float, ...]
    """Of the bins; each holds its lower edge, the last one both."""
    counts: tuple[int, ...]
    num_beyond: int
    """Values above the last edge."""


def distribution(values: np.ndarray, *, whole: bool = False) -> Distribution | None:
    """Of finite numbers, 0 or more, or None where there are none; `whole` ones get bins of whole
    numbers."""
    if not len(values):
        return None
    median, p95, p99 = (float(each) for each in np.percentile(values, (50, 95, 99)))
    least, most = float(values.min()), float(values.max())
    top = float(values[values <= FAR_OUT * p99].max())
    if whole:
        width = -(-(int(top) - int(least) + 1) // MOST_BINS)
        num_bins = -(-(int(top) - int(least) + 1) // width)
        edges = least - 0.5 + width * np.arange(num_bins + 1)
    elif top > least:
        edges = np.linspace(least, top, MOST_BINS + 1)
    else:
        edges = least + np.array([-0.5, 0.5])
    counts, _ = np.histogram(values, edges)
    return Distribution(
        count=len(values),
        least=least,
        median=median,
        mean=float(values.mean()),
        p95=p95,
        most=most,
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
        num_beyond=int((values > edges[-1]).sum()),
    )


def readable(value: float) -> str:
    """A number as people write it: 0.125, 23.98, 2,677,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
