"""How the values of one property are spread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_BINS = 40
# Where the largest value is further out than this many times the 99th percentile, the bins end at
# the latter: one clip of an hour would put all others into the first bin.
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
    """Of finite numbers, or None where there are none; `whole` ones get bins of whole numbers."""
    if not len(values):
        return None
    median, p95, p99 = (float(each) for each in np.percentile(values, (50, 95, 99)))
    least, most = float(values.min()), float(values.max())
    top = p99 if most > FAR_OUT * p99 > FAR_OUT * least else most
    if whole:
        width = -(-(int(top) - int(least) + 1) // MOST_BINS)
        num_bins = -(-(int(top) - int(least) + 1) // width)
        edges = least - 0.5 + width * np.arange(num_bins + 1)
    else:
        # Equal values have one bin around them.
        edges = np.linspace(least, top, MOST_BINS + 1) if top > least else least + np.array([0, 1])
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
