"""Statistics of captions and of numbers equal a naive count."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvr.data_prep.check.captions import LONG_WORDS, CaptionAccumulator
from tvr.data_prep.check.distribution import MAX_BINS, distribution

captions = st.sampled_from(
    ["", " ", "a", "b c", "a  b", "A b", "x " * LONG_WORDS, "x " * (LONG_WORDS + 1)]
)
videos = st.lists(
    st.tuples(st.sampled_from("uvw"), st.lists(captions, max_size=4)), min_size=0, max_size=8
)


def tally(described: list[tuple[str, list[str]]]) -> CaptionAccumulator:
    counted = CaptionAccumulator()
    for video_id, texts in described:
        counted.add(video_id, texts)
    return counted


@given(videos, st.integers(0, 8))
def test_statistics_equal_a_naive_count(
    described: list[tuple[str, list[str]]], border: int
) -> None:
    counted = tally(described[:border])
    counted.merge(tally(described[border:]))
    pairs = [(text, video_id) for video_id, texts in described for text in texts]
    distinct = {text for text, _ in pairs}
    shared = [text for text in distinct if len({v for t, v in pairs if t == text}) > 1]
    found = counted.statistics()
    assert found.num_captions == len(pairs)
    assert found.num_empty == sum(not text.strip() for text, _ in pairs)
    assert found.num_long == sum(len(text.split()) > LONG_WORDS for text, _ in pairs)
    assert found.num_repeated == len(pairs) - len(set(pairs))
    assert (found.num_distinct, found.num_shared) == (len(distinct), len(shared))
    lengths = [len(text.split()) for text, _ in pairs]
    assert (found.words is None) == (not lengths)
    if found.words is not None:
        assert found.words.count == len(lengths)
        assert (found.words.least, found.words.most) == (min(lengths), max(lengths))
        assert found.words.median == statistics.median(lengths)


@given(videos, videos)
def test_common_captions_equal_a_naive_count(
    ours: list[tuple[str, list[str]]], theirs: list[tuple[str, list[str]]]
) -> None:
    sets = [{text for _, texts in described for text in texts} for described in (ours, theirs)]
    assert tally(ours).num_also_in(tally(theirs)) == len(sets[0] & sets[1])


@given(st.lists(st.integers(0, 300), min_size=1, max_size=60))
def test_integers_have_bins_of_integers(values: list[int]) -> None:
    check(values, whole=True)


@given(st.lists(st.floats(0, 1e5, width=32), min_size=1, max_size=60))
def test_other_numbers_have_bins_of_equal_width(values: list[float]) -> None:
    check(values, whole=False)


def check(values: list[float] | list[int], *, whole: bool) -> None:
    found = distribution(np.array(values), whole=whole)
    assert found is not None
    assert (found.count, found.least, found.most) == (len(values), min(values), max(values))
    assert found.median == pytest.approx(statistics.median(values))
    assert found.mean == pytest.approx(statistics.fmean(values))
    ordered, at = sorted(values), 0.95 * (len(values) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    assert found.p95 == pytest.approx(low + (high - low) * (at - math.floor(at)))
    edges = found.edges
    assert len(edges) == len(found.counts) + 1 <= MAX_BINS + 1
    assert list(edges) == sorted(edges)
    inside = [value for value in values if value <= edges[-1]]
    assert min(values) >= edges[0]
    assert found.num_beyond == len(values) - len(inside)
    if whole:
        assert {edge % 1 for edge in edges} == {0.5}
    last = len(found.counts) - 1
    for index, (count, low, high) in enumerate(
        zip(found.counts, edges[:-1], edges[1:], strict=True)
    ):
        assert count == sum(
            low <= value < high or (index == last and value == high) for value in inside
        )


def test_one_far_value_does_not_flatten_the_others() -> None:
    found = distribution(np.array([*range(10, 30)] * 50 + [60, 3600]), whole=True)
    assert found is not None
    assert (found.most, found.num_beyond, found.counts[-1]) == (3600, 1, 1)
    assert (found.edges[0], found.edges[-1]) == (9.5, 61.5)
    assert distribution(np.array([])) is None
