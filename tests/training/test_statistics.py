"""Bootstrap intervals and paired tests: against SciPy, by hand, by coverage, and in memory."""

from __future__ import annotations

import itertools
import tracemalloc
from functools import cache

import numpy as np
import pytest
from scipy import stats

from tvr.kernels.ranking import ranks as matrix_ranks
from tvr.trainer.comparison import statistics
from tvr.trainer.comparison.statistics import (
    METRICS,
    bootstrap_interval,
    intervals,
    metrics,
    paired_differences,
)


def clustered_ranks(
    rng: np.random.Generator, videos: int, captions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks whose videos differ in difficulty, with one to `captions` captions each."""
    count = rng.integers(1, captions + 1, videos)
    difficulty = rng.choice([1.5, 4.0, 30.0], videos)
    video = np.repeat(np.arange(videos), count)
    return 1 + rng.poisson(difficulty[video] * rng.exponential(size=len(video))), video


def by_clusters(video: np.ndarray, values: np.ndarray, statistic):
    """SciPy's statistic of an array of drawn videos: all their captions, one after another."""
    of_video = [values[video == one] for one in range(video.max() + 1)]

    def found(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.apply_along_axis(
            lambda row: statistic(np.concatenate([of_video[int(one)] for one in row])), axis, drawn
        )

    return found


@pytest.mark.parametrize("clustered", [False, True])
def test_intervals_are_those_of_scipy(clustered: bool) -> None:
    rng = np.random.default_rng(0)
    ranks, video = clustered_ranks(rng, 150, 5 if clustered else 1)
    found = intervals(ranks, video if clustered else None, samples=40_000)
    statistic = {
        "recall_at_1": lambda x: 100 * np.mean(x <= 1),
        "recall_at_10": lambda x: 100 * np.mean(x <= 10),
        "median_rank": np.median,
        "mean_rank": np.mean,
    }
    for name, of in statistic.items():
        result = stats.bootstrap(
            (np.arange(video.max() + 1),),
            by_clusters(video, ranks, of),
            n_resamples=2000,
            method="percentile",
            rng=np.random.default_rng(1),
        )
        error = 4 * np.sqrt(0.025 * 0.975 / 2000)  # of the tail's share, in 2,000 resamples
        for end, share in zip(found[name], (0.025, 0.975), strict=True):
            drawn = result.bootstrap_distribution
            # The median has few values: a tail's end lies within their ties.
            assert np.mean(drawn < end - 1e-9) - error <= share, name
            assert share <= np.mean(drawn <= end + 1e-9) + error, name


def test_all_resamples_of_few_videos() -> None:
    """The distribution of three videos has 27 equally likely draws; percentiles are known."""
    ranks, video = np.array([1, 1, 7, 2, 40]), np.array([0, 0, 1, 2, 2])
    draws = list(itertools.product(range(3), repeat=3))
    for name in METRICS:
        every = np.sort(
            [metrics(np.concatenate([ranks[video == one] for one in draw]))[name] for draw in draws]
        )
        low, high = intervals(ranks, video, samples=20_000)[name]
        # Each end has a share of 1/27, more than 2.5 %.
        assert (low, high) == pytest.approx((every[0], every[-1])), name
        low, high = intervals(ranks, video, samples=20_000, confidence=0.5)[name]
        inner = [every[place] for place in (6, 7, 19, 20)]
        assert inner[0] - 1e-9 <= low <= inner[1] + 1e-9, name
        assert inner[2] - 1e-9 <= high <= inner[3] + 1e-9, name


def test_metrics_are_those_of_the_evaluation() -> None:
    import torch

    similarity = torch.rand(200, 60).mul(20).round()  # with ties
    found = matrix_ranks(similarity, torch.randint(60, (200,)))
    expected = found.metrics()
    for ranks, of in (
        (found.text_to_video, expected.text_to_video),
        (found.video_to_text, expected.video_to_text),
    ):
        ours = metrics(ranks.numpy())
        assert {name: getattr(of, name) for name in ours if hasattr(of, name)} == pytest.approx(
            {name: value for name, value in ours.items() if hasattr(of, name)}
        )


@cache
def coverage() -> dict[bool, dict[str, float]]:
    """Share of 250 data sets whose intervals hold the population's value, by videos and not."""
    rng = np.random.default_rng(3)
    population, _ = clustered_ranks(rng, 100_000, 8)
    truth = metrics(population)
    names = ("recall_at_1", "recall_at_10", "mean_rank")
    held = {by_video: dict.fromkeys(names, 0) for by_video in (True, False)}
    for trial in range(250):
        ranks, video = clustered_ranks(rng, 120, 8)
        for by_video, counts in held.items():
            found = intervals(ranks, video if by_video else None, samples=250, seed=trial)
            for name in names:
                counts[name] += found[name][0] <= truth[name] <= found[name][1]
    return {by: {name: one / 250 for name, one in counts.items()} for by, counts in held.items()}


def test_intervals_cover_as_often_as_they_say() -> None:
    """Nominal 95 %, within three binomial errors and the 1 % that 120 videos and 250 draws cost."""
    error = 3 * np.sqrt(0.95 * 0.05 / 250)
    for name, share in coverage()[True].items():
        assert 0.95 - error - 0.01 <= share <= 0.95 + error, name


def test_captions_of_a_video_are_not_independent() -> None:
    """Without the videos the same intervals are too narrow, far beyond the binomial error."""
    shares = coverage()[False]
    assert max(shares.values()) < 0.95 - 3 * np.sqrt(0.95 * 0.05 / 250)
    assert min(shares.values()) < 0.8


def test_p_values_under_equality() -> None:
    """Two systems of equal quality differ significantly as often as the level says."""
    rng = np.random.default_rng(5)
    below = 0
    for trial in range(200):
        one, video = clustered_ranks(rng, 120, 4)
        swap = rng.random(120)[video] < 0.5  # which of two systems a video's ranks belong to
        other = np.maximum(1, one + rng.integers(-3, 4, len(one)))
        first, second = np.where(swap, one, other), np.where(swap, other, one)
        found = paired_differences(first, second, video, samples=200, seed=trial)
        below += found["mean_rank"].p <= 0.05
    assert abs(below / 200 - 0.05) <= 3 * np.sqrt(0.05 * 0.95 / 200) + 0.005


def test_the_p_value_is_what_it_is_defined_as() -> None:
    """By all 64 draws of three queries, each twice as likely as the next."""
    first, second = np.array([9, 9, 9]), np.array([8, 6, 1])
    gain = second - first
    draws = np.array(list(itertools.product(range(3), repeat=3)))
    means = gain[draws].mean(axis=1)
    exact = np.mean(np.abs(means - gain.mean()) >= abs(gain.mean()) - 1e-9)
    found = paired_differences(second, first, samples=50_000)["mean_rank"]
    assert found.value == pytest.approx(gain.mean())
    assert found.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 50_000))
    assert (found.low, found.high) == (means.min(), means.max())


def test_p_is_never_zero_and_one_for_equal_systems() -> None:
    ranks = np.arange(1, 200)
    found = paired_differences(ranks + 500, ranks, samples=999)
    assert found["mean_rank"].p == found["recall_at_50"].p == 1 / 1000
    same = paired_differences(ranks, ranks, samples=99)
    assert {one.p for one in same.values()} == {1.0}
    assert {(one.value, one.low, one.high) for one in same.values()} == {(0.0, 0.0, 0.0)}


def test_equal_seeds_give_equal_intervals() -> None:
    ranks, video = clustered_ranks(np.random.default_rng(0), 50, 3)
    assert intervals(ranks, video, samples=500) == intervals(ranks, video, samples=500)
    assert intervals(ranks, video, samples=500) != intervals(ranks, video, samples=500, seed=1)
    names = [f"video {one}" for one in video]
    by_name = intervals(ranks, names, samples=500)
    assert by_name.keys() == dict.fromkeys(METRICS).keys()


def test_a_wide_spread_of_medians() -> None:
    """More candidates for the median than columns: interpolated, within 0.1 standard errors."""
    rng = np.random.default_rng(2)
    values = rng.integers(1, 10**6, 6000)
    low, high = bootstrap_interval(values, "median", samples=2000)
    # The median's standard error is 1 / (2 f sqrt(n)), with density f = 1e-6.
    error = 1e6 / (2 * np.sqrt(6000))
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)
    assert (low + high) / 2 == pytest.approx(np.median(values), abs=0.5 * error)


def test_a_window_that_is_too_narrow_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = np.random.default_rng(1).integers(1, 60, 200)
    expected = bootstrap_interval(ranks, "median", samples=3000)
    monkeypatch.setattr(statistics, "_MEDIAN_WINDOW", 0.01)
    assert bootstrap_interval(ranks, "median", samples=3000) == expected


def test_memory_does_not_grow_with_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 resamples of 100,000 queries: the table of draws would have 8 GB."""
    ranks = np.random.default_rng(0).geometric(0.2, 100_000)
    monkeypatch.setattr(statistics, "MAX_CLUSTERS", 256)
    tracemalloc.start()
    found = intervals(ranks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120e6
    # Groups of queries at random give the error of the queries.
    low, high = found["recall_at_1"]
    assert (high - low) / (2 * 1.96 * 100 * np.sqrt(0.2 * 0.8 / 100_000)) == pytest.approx(
        1, abs=4 / np.sqrt(2 * 256)
    )


def test_one_long_key_needs_no_more_memory() -> None:
    ranks = list(range(1, 2001))
    keys = [f"video {number // 2}" for number in range(2000)]
    expected = intervals(ranks, np.array(keys), samples=20)
    # The same order of keys, so the same resamples.
    long = [key + "x" * 50_000 if key == "video 999" else key for key in keys]
    tracemalloc.start()
    assert intervals(ranks, long, samples=20) == expected
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_no_error_of_ends_without_another_case() -> None:
    assert intervals([1, 1, 1], samples=50)["recall_at_1"] == (100.0, 100.0)
    assert intervals([3], samples=50)["median_rank"] == (3.0, 3.0)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        intervals([])
    with pytest.raises(ValueError, match="value 1 is nan"):
        bootstrap_interval([1.0, np.nan])
    with pytest.raises(ValueError, match="2 clusters for 3 queries"):
        intervals([1, 2, 3], ["a", "b"])
    with pytest.raises(ValueError, match="not of the same queries"):
        paired_differences([1, 2], [1])
    with pytest.raises(ValueError, match="samples=0"):
        intervals([1, 2], samples=0)
    with pytest.raises(ValueError, match="confidence=95"):
        intervals([1, 2], confidence=95, samples=5)
