"""Paired statistics of rows over queries and seeds.

A row is a table of values, (seeds, queries). A resample draws seeds and, apart from them, clusters
of queries, both with replacement, and takes the differences at all crossings (the pigeonhole
bootstrap: Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 386-411; it
errs on the wide side). So an interval covers new seeds as well as new queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tvr.trainer.comparison.statistics import bootstrap_interval

SAMPLES = 10_000
DEPTHS = (1, 5, 10)
_COUNTS_PER_PIECE = 1 << 21

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Mean(NamedTuple):
    """A mean over seeds and queries, with 95 % intervals."""

    value: float
    interval: tuple[float, float]
    """Over seeds and queries."""
    of_queries: tuple[float, float]
    """Over queries alone, for these seeds."""


def values_of(ranks: Ints) -> dict[str, Floats]:
    """Metrics of each query, the mean of both ways.

    Args:
        ranks: (S, 2, Q), text to video and video to text of clip q.

    Returns:
        (S, Q) by metric: hits in percent, 100 / rank, and the rank.
    """
    found = {f"recall_at_{k}": 100.0 * (ranks <= k).mean(axis=1) for k in DEPTHS}
    reciprocal = (100.0 / ranks).mean(axis=1)
    return {**found, "mean_reciprocal_rank": reciprocal, "mean_rank": ranks.mean(axis=1)}


def crossed_interval(
    values: Floats, clusters: Sequence[str] | NDArray[Any], *, samples: int = SAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of (S, Q) values, over seeds and clusters."""
    names, code = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.stack([np.bincount(code, row, len(names)) for row in values])
    sizes = np.bincount(code, minlength=len(names)).astype(np.float64)
    rng, means = np.random.default_rng(seed), list[Floats]()
    piece = max(1, _COUNTS_PER_PIECE // len(names))
    for start in range(0, samples, piece):
        rows = min(piece, samples - start)
        of_seeds = _draws(rng, rows, len(values))
        of_clusters = _draws(rng, rows, len(names))
        total = ((of_seeds @ sums) * of_clusters).sum(axis=1)
        means.append(total / (len(values) * (of_clusters @ sizes)))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def _draws(rng: np.random.Generator, rows: int, count: int) -> Floats:
    """(rows, count) how often each of `count` is drawn in `count` draws."""
    drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(float)


def mean_of(values: Floats, clusters: Sequence[str] | NDArray[Any], seed: int = 0) -> Mean:
    """The mean of (S, Q) values with both intervals."""
    per_query = bootstrap_interval(
        values.mean(axis=0), clusters=np.asarray(clusters), samples=SAMPLES, seed=seed
    )
    return Mean(float(values.mean()), crossed_interval(values, clusters, seed=seed), per_query)


def compare(row: Ints, first: Ints, clusters: Sequence[str] | NDArray[Any]) -> dict[str, Mean]:
    """Each metric of a row minus that of the first one, paired by seed and query.

    Args:
        row, first: (S, 2, Q) ranks of the same seeds and queries.

    Raises:
        ValueError: the shapes differ.
    """
    if row.shape != first.shape:
        raise ValueError(f"ranks of shapes {row.shape} and {first.shape} are no pairs")
    mine, theirs = values_of(row), values_of(first)
    return {name: mean_of(mine[name] - theirs[name], clusters) for name in mine}


def rounded(means: Mapping[str, Mean]) -> dict[str, dict[str, Any]]:
    """As JSON takes them, with three decimals."""
    return {
        name: {
            "value": round(mean.value, 3),
            "interval": [round(x, 3) for x in mean.interval],
            "of_queries": [round(x, 3) for x in mean.of_queries],
        }
        for name, mean in means.items()
    }
