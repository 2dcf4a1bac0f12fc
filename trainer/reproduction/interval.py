"""The interval of a recall over trained seeds and test videos together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvr.trainer.comparison.statistics import bootstrap_interval

# Two-sided 95 % quantiles of Student's t for 1 to 9 degrees of freedom.
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedInterval:
    """A recall of several seeds, in percent, with its 95 % interval."""

    mean: float
    deviation: float | None
    """Standard deviation over the seeds (n - 1); None for one seed."""
    low: float
    high: float
    of_videos: tuple[float, float]
    """The part of the videos alone."""


def student_t(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t.

    From ten degrees on by the expansion of Cornish and Fisher in 1 / degrees, which is right to
    three decimals there (Abramowitz and Stegun 26.7.5).

    Raises:
        ValueError: degrees is below 1.
    """
    if degrees < 1:
        raise ValueError(f"degrees={degrees} must be at least 1")
    if degrees <= len(_STUDENT_T):
        return _STUDENT_T[degrees - 1]
    x = NormalDist().inv_cdf(0.975)
    first = (x**3 + x) / 4
    second = (5 * x**5 + 16 * x**3 + 3 * x) / 96
    third = (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384
    return x + first / degrees + second / degrees**2 + third / degrees**3


def recall_interval(
    ranks: Sequence[NDArray[Any]],
    videos: Sequence[object] | NDArray[Any],
    *,
    k: int = 1,
    samples: int = 10_000,
) -> SeedInterval:
    """Computes the mean R@k of several seeds and its 95 % interval.

    Two errors are independent of each other: which videos the test set holds, and which seeds were
    trained. The first is a bootstrap over videos of the recall's mean over the seeds: all seeds are
    resampled alike, since they share the test set. The second is Student's interval of the mean of
    S values, t_{S-1} s / sqrt(S). Half-widths of independent errors add as squares, on each side:

        low  = m - sqrt((m - low_v)^2  + t^2 s^2 / S)
        high = m + sqrt((high_v - m)^2 + t^2 s^2 / S)

    s also holds the chance by which seeds differ on few videos, so the interval is rather too wide
    than too narrow. A single seed has no second error: its interval is that of the videos alone.

    Args:
        ranks: S arrays (A,) of the ranks of the same queries, from 1.
        videos: (A,) video of each query.
        k: The recall's depth.
        samples: Resamples of the bootstrap.

    Raises:
        ValueError: there is no seed, or the seeds have different numbers of queries.
    """
    if not ranks or any(len(own) != len(videos) for own in ranks):
        counts = [len(own) for own in ranks]
        raise ValueError(f"ranks of {counts} queries; each seed needs those of {len(videos)}")
    hits = np.stack([np.where(np.asarray(own) <= k, 100.0, 0.0) for own in ranks])
    low, high = bootstrap_interval(hits.mean(axis=0), clusters=videos, samples=samples)
    of_seeds = hits.mean(axis=1)
    mean, count = float(of_seeds.mean()), len(of_seeds)
    deviation = None if count == 1 else float(of_seeds.std(ddof=1))
    spread = 0.0 if deviation is None else student_t(count - 1) * deviation / math.sqrt(count)
    return SeedInterval(
        mean=mean,
        deviation=deviation,
        low=max(0.0, mean - math.hypot(mean - low, spread)),
        high=min(100.0, mean + math.hypot(high - mean, spread)),
        of_videos=(low, high),
    )
