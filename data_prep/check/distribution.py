"""Summary statistics and a histogram of one numeric property."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_BINS = 40
# Values above this multiple of the 99th percentile are not binned: a single clip of an hour would
# otherwise put all other clips into the first bin.
OUTLIER_FACTOR = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Summary and histogram of at least one value."""

    count: int
    least: float
    median: float
    mean: float
    p95: float
    """95th percentile, linearly interpolated as the median."""
    most: float
    edges: tuple[float, ...]
    """Bin edges; a bin includes its lower edge, the last bin both edges."""
    counts: tuple[int, ...]
    """Values per bin."""
    num_beyond: int
    """Values above the last edge."""


def distribution(values: np.ndarray, *, whole: bool = False) -> Distribution | None:
    """Summarises finite, non-negative numbers; None if there are none.

    Args:
        values: (n,) numbers.
        whole: The values are integers: bins get integer widths and are centred on integers.
    """
    if not len(values):
        return None
    median, p95, p99 = (float(each) for each in np.percentile(values, (50, 95, 99)))
    least, most = float(values.min()), float(values.max())
    top = float(values[values <= OUTLIER_FACTOR * p99].max())
    if whole:
        width = -(-(int(top) - int(least) + 1) // MAX_BINS)
        num_bins = -(-(int(top) - int(least) + 1) // width)
        edges = least - 0.5 + width * np.arange(num_bins + 1)
    elif top > least:
        edges = np.linspace(least, top, MAX_BINS + 1)
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
    """Formats a number for people: 0.125, 23.98, 2,677,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
