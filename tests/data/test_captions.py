"""Statistics of captions and of numbers equal a naive count, and which captions are equal."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvr.data_prep.check.captions import LONG_WORDS, CaptionAccumulator, expected_equal_pairs
from tvr.data_prep.check.distribution import MAX_BINS, distribution
from tvr.data_prep.records import hash_caption, normal_caption

captions = st.sampled_from(
    ["", " ", "a", "b c", "a  b", "A b.", "b  C", "x " * LONG_WORDS, "x " * (LONG_WORDS + 1)]
)
videos = st.lists(
    st.tuples(st.sampled_from("uvw"), st.lists(captions, max_size=4)), min_size=0, max_size=8
)


def normal(text: str) -> str:
    """The normal form of the captions above."""
    return " ".join(text.lower().removesuffix(".").split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man  plays\tthe guitar. ", "a man plays the guitar"),
        ("a man plays the guitar ...", "a man plays the guitar"),
        ("\u3000A\u00a0man\u2003plays\u2026", "a man plays"),
        ("Stra\u00dfe", "strasse"),
        ("cafe\u0301", "caf\u00e9"),
        ("CAFE\u0301!", "caf\u00e9"),
        ("\u4e00\u4e2a\u4eba\u3002", "\u4e00\u4e2a\u4eba"),
        ("\u0915\u0964", "\u0915"),
        ("?!", "?!"),
        ("...", "..."),
        ("100%", "100%"),
        ("it's 3.5 m", "it's 3.5 m"),
        ('he says "no."', 'he says "no."'),
        (" ", ""),
    ],
    ids=ascii,
)
def test_equal_captions_have_the_same_normal_form(text: str, expected: str) -> None:
    assert normal_caption(text) == expected
    assert normal_caption(expected) == expected
    assert hash_caption(text) == hash_caption(expected)
    assert 0 <= hash_caption(text) < 2**63


@given(st.text("aB .!?,%\u0301\u0345\u00df\u0130\u03a3\u3000\u3002\u2026\ud800", max_size=6))
def test_the_normal_form_is_a_fixed_point(text: str) -> None:
    found = normal_caption(text)
    assert normal_caption(found) == found
    assert hash_caption(found) == hash_caption(text)


def test_hashes_are_those_of_other_processes() -> None:
    assert hash_caption("A man plays.") == hash_caption("a man plays") == 2393061788014163140


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
    pairs_of_captions = [(normal(text), video_id) for text, video_id in pairs]
    distinct = Counter(text for text, _ in pairs_of_captions)
    videos_of = {text: {v for t, v in pairs_of_captions if t == text} for text in distinct}
    shared = [text for text in distinct if len(videos_of[text]) > 1]
    found = counted.statistics()
    assert found.num_captions == len(pairs)
    assert found.num_empty == sum(not text.strip() for text, _ in pairs)
    assert found.num_long == sum(len(text.split()) > LONG_WORDS for text, _ in pairs)
    assert found.num_repeated == len(pairs) - len(set(pairs_of_captions))
    assert (found.num_distinct, found.num_shared) == (len(distinct), len(shared))
    assert found.num_sharing == sum(distinct[text] for text in shared)
    agreeing = [
        sum(normal(x) == normal(y) for x, y in product(ours, theirs)) / (len(ours) * len(theirs))
        for (first, ours), (second, theirs) in combinations(described, 2)
        if first != second and ours and theirs
    ]
    num_pairs = max(1, math.comb(len(described), 2))
    assert found.equal_probability == pytest.approx(sum(agreeing) / num_pairs)
    frequent = counted.most_frequent(2)
    assert len(frequent) == min(2, len(shared))
    assert [each.num_videos for each in frequent] == sorted(
        (len(videos_of[text]) for text in shared), reverse=True
    )[:2]
    for each in frequent:
        holds = [
            any(hash_caption(text) == each.caption_hash for text in texts) for _, texts in described
        ]
        assert each.sample == holds.index(True)
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
    sets = [
        {normal(text) for _, texts in described for text in texts} for described in (ours, theirs)
    ]
    assert tally(ours).num_also_in(tally(theirs)) == len(sets[0] & sets[1])


@pytest.mark.parametrize("batch", [1, 2, 5, 6, 8, 12, 17])
def test_expected_pairs_equal_a_count_over_epochs(batch: int) -> None:
    texts, draw = ["a", "b", "A.", "c", "b", "a"], random.Random(0)
    counted = tally([(str(row), [text]) for row, text in enumerate(texts)])
    expected = expected_equal_pairs(counted.statistics().equal_probability, len(texts), batch)
    num_trials, total = 2000, 0
    texts = list(map(normal, texts))
    for _ in range(num_trials):
        epochs = [draw.sample(range(6), 6) for _ in range(-(-batch // 6))]
        rows = [row for epoch in epochs for row in epoch][:batch]
        per_text = Counter(texts[row] for row in rows)
        per_row = Counter(rows)
        total += sum(math.comb(count, 2) for count in per_text.values())
        total -= sum(math.comb(count, 2) for count in per_row.values())
    assert expected == pytest.approx(total / num_trials, rel=0.1)
    assert expected_equal_pairs(0.5, 1, batch) == 0.0


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
