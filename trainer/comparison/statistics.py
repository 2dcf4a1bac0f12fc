"""Bootstrap intervals and tests of retrieval metrics, from the ranks of the queries alone.

The captions of a video are not independent: a video that is hard to find is so for all of them. So
a resample draws videos, with replacement, and takes all queries of each (cluster bootstrap, Davison
and Hinkley 1997, chapter 3.8). Where each video has one query that is the usual bootstrap.

Every statistic here follows from sums over queries: recalls and means are quotients of two sums,
and the median follows from counts of ranks up to some value. A resample is a row of counts of the
videos, so many resamples are one matrix product, in pieces of bounded memory.

Intervals are percentile intervals. BCa needs an acceleration from a jackknife, which has no meaning
for a median, and none at a recall of 0 or 100 %; the percentile interval stays within 0 and 100 %.
At a recall of exactly 0 or 100 % it has no width: the queries hold no other case to draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SAMPLES = 10_000
CONFIDENCE = 0.95
MAX_CLUSTERS = 4096
"""More clusters are dealt at random into so many groups, which are drawn whole. The width of an
interval then has a relative standard error of 1 / sqrt(2 MAX_CLUSTERS) = 1.1 %."""
COUNTS_PER_PIECE = 1 << 21
RECALL_DEPTHS = (1, 5, 10, 50)
METRICS = (*(f"recall_at_{k}" for k in RECALL_DEPTHS), "median_rank", "mean_rank")
"""Metrics with an interval; recalls in percent."""
# Resampled medians lie within so many standard errors of the median; if not, more ranks are tried.
_MEDIAN_WINDOW = 6.0

Interval = tuple[float, float]
Statistic = Literal["mean", "median"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric of one system minus that of another, on the same queries."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided, of the hypothesis that the metric is the same; see `paired_differences`."""


def bootstrap_interval(
    values: Sequence[float] | NDArray[Any],
    statistic: Statistic = "mean",
    *,
    clusters: Sequence[object] | NDArray[Any] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Computes a percentile bootstrap interval of the mean or the median of one value a query.

    Args:
        values: (A,) one finite number for each query.
        statistic: Mean, or median (of an even number the mean of the middle two).
        clusters: (A,) video of each query, of any type that has an order; None: all are different.
        samples: Number of resamples.
        seed: The same seed gives the same interval.
        confidence: Share of repetitions that cover the truth, 0.95 for a 95 % interval.

    Raises:
        ValueError: no values, one that is not finite, or another number of clusters.
    """
    checked = _checked(values)
    parts = [_Ratio(checked) if statistic == "mean" else _Median(checked, clusters)]
    (found,) = _resampled(parts, len(checked), clusters, samples, seed)
    return _percentiles(found, confidence)


def intervals(
    ranks: Sequence[int] | NDArray[Any],
    clusters: Sequence[object] | NDArray[Any] | None = None,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> dict[str, Interval]:
    """Computes an interval for each metric of one direction.

    Args:
        ranks: (A,) rank of each query's best right answer, from 1.
        clusters, samples, seed, confidence: As in `bootstrap_interval`.

    Returns:
        Low and high end by name of `METRICS`; recalls in percent.

    Raises:
        ValueError: as `bootstrap_interval`.
    """
    checked = _checked(ranks)
    found = _resampled(_metric_parts(checked, clusters), len(checked), clusters, samples, seed)
    pairs = zip(METRICS, found, strict=True)
    return {name: _percentiles(values, confidence) for name, values in pairs}


def metrics(ranks: Sequence[int] | NDArray[Any]) -> dict[str, float]:
    """The metrics themselves, as `tvr.kernels.ranking` defines them; recalls in percent."""
    checked = _checked(ranks)
    recalls = {f"recall_at_{k}": 100 * float(np.mean(checked <= k)) for k in RECALL_DEPTHS}
    return recalls | {
        "median_rank": float(np.median(checked)),
        "mean_rank": float(np.mean(checked)),
    }


def paired_differences(
    ranks: Sequence[int] | NDArray[Any],
    first: Sequence[int] | NDArray[Any],
    clusters: Sequence[object] | NDArray[Any] | None = None,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> dict[str, Difference]:
    """Compares two systems on the same queries by a paired bootstrap test.

    Both systems have the same resamples. Let d be the difference of a metric, and d_1 to d_n those
    of n resamples. If the systems were equal, differences would spread around 0 as the d_i spread
    around d. So, of the b resamples with |d_i - d| >= |d|,

        p = (b + 1) / (n + 1)

    which is two-sided, and never 0 (Efron and Tibshirani 1993, chapter 16; Davison and Hinkley
    1997, equation 4.11). p is 1 if d is 0. Tests of several metrics or systems are not corrected
    for their number.

    Args:
        ranks: (A,) ranks of a system.
        first: (A,) ranks of the system to compare with, of the same queries in the same order.
        clusters, samples, seed, confidence: As in `bootstrap_interval`.

    Returns:
        `ranks` minus `first` by name of `METRICS`.

    Raises:
        ValueError: as `bootstrap_interval`, or different numbers of queries.
    """
    own, other = _checked(ranks), _checked(first)
    if len(own) != len(other):
        raise ValueError(f"{len(own)} ranks and {len(other)} are not of the same queries")
    parts = _metric_parts(own, clusters) + _metric_parts(other, clusters)
    found = _resampled(parts, len(own), clusters, samples, seed)
    of_own, of_other = metrics(own), metrics(other)
    result = {}
    for name, mine, theirs in zip(
        METRICS, found[: len(METRICS)], found[len(METRICS) :], strict=True
    ):
        value, resampled = of_own[name] - of_other[name], mine - theirs
        # Sums in another order round differently; that must not decide about equality.
        slack = 1e-9 * max(1.0, abs(of_own[name]), abs(of_other[name]))
        as_far = int(np.sum(np.abs(resampled - value) >= abs(value) - slack))
        low, high = _percentiles(resampled, confidence)
        result[name] = Difference(value, low, high, (as_far + 1) / (samples + 1))
    return result


class _Ratio:
    """A sum of values over the number of queries."""

    def __init__(self, values: Floats) -> None:
        self._values = values

    def columns(self) -> Iterator[NDArray[Any]]:
        """(A,) numbers of each query, whose sums over a resample `finish` takes."""
        yield self._values
        yield np.ones_like(self._values)

    def finish(self, sums: Floats) -> tuple[Floats, bool]:
        return sums[:, 0] / sums[:, 1], True


class _Median:
    """The median, from the counts of queries up to each of a window of values.

    The window holds all values that the median of a resample may be. Above `limit` values it holds
    as many of them at equal steps of their order, and the median is interpolated between them.
    """

    def __init__(self, values: Floats, clusters: Sequence[object] | NDArray[Any] | None) -> None:
        self._values = values
        self._distinct, counts = np.unique(values, return_counts=True)
        self._share = np.cumsum(counts) / len(values)
        code = _codes(clusters, len(values))
        clustered = int(code.max()) + 1
        is_below = values <= np.median(values)
        below = np.bincount(code, is_below - is_below.mean())
        self._error = max(float(np.sqrt(np.sum(below**2))) / len(values), 0.5 / len(values))
        self._limit = max(64, 200_000 // min(clustered, MAX_CLUSTERS))
        self._width = _MEDIAN_WINDOW
        self._choose()

    def _choose(self) -> None:
        half = self._width * self._error
        first = int(np.searchsorted(self._share, 0.5 - half))
        last = int(np.searchsorted(self._share, 0.5 + half))
        last = min(last + 1, len(self._distinct) - 1)
        steps = min(last - first + 1, self._limit)
        places = np.unique(np.linspace(first, last, steps).astype(np.int64))
        self._is_exact = len(places) == last - first + 1
        self._at_start, self._at_end = first == 0, last == len(self._distinct) - 1
        self._window = self._distinct[places]

    def columns(self) -> Iterator[NDArray[Any]]:
        """(A,) numbers of each query, whose sums over a resample `finish` takes."""
        for value in self._window:
            yield self._values <= value
        yield np.ones_like(self._values)

    def finish(self, sums: Floats) -> tuple[Floats, bool]:
        """The medians; False if a resample's lies outside of the window, which is widened."""
        counts, total = np.rint(sums[:, :-1]), np.rint(sums[:, -1:])
        lower, upper = (total - 1) // 2, total // 2  # places of the middle two, from 0
        too_low = not self._at_start and bool((counts[:, :1] > lower).any())
        too_high = not self._at_end and bool((counts[:, -1:] <= upper).any())
        if too_low or too_high:
            self._width *= 4
            self._choose()
            return total[:, 0], False
        if self._is_exact:
            places = [(counts <= place).sum(axis=1) for place in (lower, upper)]
            return (self._window[places[0]] + self._window[places[1]]) / 2, True
        after = (counts <= lower).sum(axis=1)
        before = np.maximum(after - 1, 0)
        rows = np.arange(len(counts))
        here, there = counts[rows, before], counts[rows, after]
        share = np.clip((total[:, 0] / 2 - here) / np.maximum(there - here, 1), 0, 1)
        return self._window[before] + share * (self._window[after] - self._window[before]), True


_Part = _Ratio | _Median


def _metric_parts(ranks: Floats, clusters: Sequence[object] | NDArray[Any] | None) -> list[_Part]:
    parts: list[_Part] = [_Ratio(np.where(ranks <= k, 100.0, 0.0)) for k in RECALL_DEPTHS]
    return [*parts, _Median(ranks, clusters), _Ratio(ranks)]


def _resampled(
    parts: Sequence[_Part],
    queries: int,
    clusters: Sequence[object] | NDArray[Any] | None,
    samples: int,
    seed: int,
) -> list[Floats]:
    """(samples,) values of every statistic; the resamples are the same for all."""
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    code, rng = _codes(clusters, queries), np.random.default_rng(seed)
    if (count := int(code.max()) + 1) > MAX_CLUSTERS:
        dealt = rng.permutation(count) % MAX_CLUSTERS
        code, count = dealt[code], MAX_CLUSTERS
    start = rng.bit_generator.state
    found: list[Floats | None] = [None] * len(parts)
    while open_parts := [place for place, values in enumerate(found) if values is None]:
        # A window that had to be widened sees the same resamples again.
        rng.bit_generator.state = start
        columns = [_per_cluster(parts[place].columns(), code, count) for place in open_parts]
        ends = np.cumsum([part.shape[1] for part in columns])[:-1]
        table = np.concatenate(columns, axis=1)
        pieces = [draws @ table for draws in _draws(count, samples, rng)]
        sums = np.split(np.concatenate(pieces), ends, axis=1)
        for place, of_part in zip(open_parts, sums, strict=True):
            values, is_whole = parts[place].finish(of_part)
            found[place] = values if is_whole else None
    return [values for values in found if values is not None]


def _draws(count: int, samples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yields (piece, count) how often each cluster is drawn in each resample."""
    piece = max(1, COUNTS_PER_PIECE // count)
    for start in range(0, samples, piece):
        rows = min(piece, samples - start)
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count)
        yield times.reshape(rows, count).astype(np.float64)


def _per_cluster(columns: Iterable[NDArray[Any]], code: Ints, count: int) -> Floats:
    """(count, K) sums of the K columns over the queries of each cluster."""
    sums = [np.bincount(code, column, count) for column in columns]
    return np.stack(sums, axis=1).astype(np.float64)


def _codes(clusters: Sequence[object] | NDArray[Any] | None, queries: int) -> Ints:
    """(A,) clusters as numbers from 0."""
    if clusters is None:
        return np.arange(queries)
    if len(clusters) != queries:
        raise ValueError(f"{len(clusters)} clusters for {queries} queries; each query needs one")
    if isinstance(clusters, np.ndarray):
        return np.unique(clusters, return_inverse=True)[1].reshape(-1)
    # An array of texts would give each the length of the longest one.
    distinct: list[Any] = list(set(clusters))
    place = {cluster: number for number, cluster in enumerate(sorted(distinct))}
    return np.fromiter((place[cluster] for cluster in clusters), np.int64, queries)


def _checked(values: Sequence[float] | NDArray[Any]) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(
            f"values of shape {found.shape}: need one number for each query, at least one"
        )
    if not np.isfinite(found).all():
        place = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ValueError(f"value {place} is {found[place]}; all must be finite")
    return found


def _percentiles(values: Floats, confidence: float) -> Interval:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1")
    tail = 50 * (1 - confidence)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
