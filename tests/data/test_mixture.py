"""The mixture of training sets: its shares, its purity, and golden positions that stay."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvr.data_prep.mixture import BLOCK, MAX_BLOCKS, Mixture, block_quotas

names = st.sampled_from(["web", "films", "a", "b_2", "z9"])
# No set so light that it would be refused.
mixtures = st.dictionaries(names, st.floats(0.2, 100.0), min_size=1, max_size=5)
seeds = st.integers(0, 2**63 - 1)
blocks = st.integers(0, 10**9)


def by_set(mixture: Mixture, start: int, stop: int) -> dict[str, list[int]]:
    """The own positions of each set between two stream positions, in the order of the stream."""
    sets, own = mixture.locate_range(start, stop)
    return {name: own[sets == number].tolist() for number, name in enumerate(mixture.names)}


@settings(max_examples=40)
@given(mixtures, seeds, blocks)
def test_each_block_has_exact_shares_and_continues_every_set(
    weights: dict[str, float], seed: int, block: int
) -> None:
    mixture = Mixture(weights, seed)
    found = by_set(mixture, block * BLOCK, (block + 1) * BLOCK)
    total = sum(map(Fraction, weights.values()))
    for (name, own), quota in zip(found.items(), mixture.quotas, strict=True):
        assert own == list(range(block * quota, (block + 1) * quota))
        assert abs(quota - Fraction(weights[name]) * BLOCK / total) < 1
    assert sum(mixture.quotas) == BLOCK


@settings(max_examples=40)
@given(mixtures, seeds, st.integers(0, 3 * BLOCK), st.integers(0, 2 * BLOCK))
def test_a_stretch_holds_each_set_in_proportion(
    weights: dict[str, float], seed: int, start: int, length: int
) -> None:
    mixture = Mixture(weights, seed)
    stop = start + length
    counts = {name: len(own) for name, own in by_set(mixture, start, stop).items()}
    drawn = [mixture.drawn(position) for position in (start, stop)]
    assert counts == {name: drawn[1][name] - drawn[0][name] for name in mixture.names}
    assert sum(counts.values()) == length
    parts = len(range(start // BLOCK, -(-stop // BLOCK)))
    for name, share in zip(mixture.names, mixture.shares, strict=True):
        # Keys j + u let a set be early or late by one position at each end of a block's part.
        slack = parts * (1 + len(weights)) + 1
        assert abs(counts[name] - share * length) <= slack


@settings(max_examples=40)
@given(mixtures, seeds, st.lists(st.integers(0, 12 * BLOCK), min_size=1, max_size=12))
def test_a_position_is_the_same_after_any_history_and_order_of_names(
    weights: dict[str, float], seed: int, positions: list[int]
) -> None:
    walked = Mixture(weights, seed)
    reversed_names = dict(reversed(weights.items()))
    found = [walked.locate(position) for position in positions]
    assert found == [Mixture(reversed_names, seed).locate(position) for position in positions]
    assert len(walked._blocks) <= MAX_BLOCKS
    for position, pair in zip(positions, found, strict=True):
        sets, own = walked.locate_range(position, position + 1)
        assert (int(sets[0]), int(own[0])) == pair
        assert walked.drawn(position)[walked.names[pair[0]]] == pair[1]


def test_a_single_set_has_the_stream_and_the_seed_of_the_run() -> None:
    alone = Mixture({"web": 0.3}, 11)
    sets, own = alone.locate_range(2 * BLOCK - 5, 4 * BLOCK + 5)
    assert not sets.any()
    assert own.tolist() == list(range(2 * BLOCK - 5, 4 * BLOCK + 5))
    assert alone.set_seed(0) == 11


def test_sets_seeds_and_blocks_are_independent() -> None:
    weights = {"films": 1.0, "web": 1.0}
    first = Mixture(weights, 0)
    seeds_of = {Mixture(weights, seed).set_seed(number) for seed in (0, 1) for number in (0, 1)}
    assert len(seeds_of) == 4
    assert all(0 <= seed < 2**63 for seed in seeds_of)
    assert first.set_seed(1) == Mixture({"web": 3.0, "other": 1.0}, 0).set_seed(1)
    patterns = [
        tuple(mixture.locate_range(start, start + BLOCK)[0].tolist())
        for mixture in (first, Mixture(weights, 1))
        for start in (0, BLOCK)
    ]
    assert len(set(patterns)) == 4
    # Adjacent positions are of either set: no set comes in runs, and none alternates.
    sets = np.array(patterns[0])
    assert 0.2 < (sets[1:] == sets[:-1]).mean() < 0.6


def test_golden_positions() -> None:
    """Golden values: changing them changes the data of every resumed run (an order break)."""
    mixture = Mixture({"web": 5.0, "films": 2.5, "own": 0.5}, 1234)
    assert dict(zip(mixture.names, mixture.quotas, strict=True)) == {
        "films": 1280,
        "own": 256,
        "web": 2560,
    }
    assert [mixture.set_seed(number) for number in range(3)] == [
        4047083891200010658,
        8675871092971505585,
        3864649897029000908,
    ]
    assert [mixture.locate(position) for position in range(16)] == [
        *((2, 0), (0, 0), (2, 1), (0, 1), (2, 2), (2, 3), (2, 4), (0, 2)),
        *((2, 5), (1, 0), (2, 6), (2, 7), (0, 3), (2, 8), (2, 9), (0, 4)),
    ]
    sets, own = mixture.locate_range(10**12, 10**12 + 6)
    assert sets.tolist() == [2, 0, 2, 2, 1, 0]
    assert own.tolist() == [
        *(625000000000, 312500000000, 625000000001),
        *(625000000002, 62500000000, 312500000001),
    ]


def test_quotas_round_by_the_largest_remainder() -> None:
    assert block_quotas({"c": 1.0, "a": 1.0, "b": 1.0}) == {"a": 1366, "b": 1365, "c": 1365}
    assert block_quotas({"a": 1e300, "b": 1e300}) == {"a": 2048, "b": 2048}
    assert block_quotas({"a": 4095.4, "b": 0.6}) == {"a": 4095, "b": 1}
    assert Counter(block_quotas({f"s{n}": 1.0 for n in range(4096)}).values()) == {1: 4096}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "at least one training set"),
        ({"Web": 1.0}, "'Web' is no name of a training set"),
        ({"a/b": 1.0}, "'a/b' is no name"),
        ({"a" * 33: 1.0}, "is no name of a training set"),
        ({"": 1.0}, "'' is no name"),
        ({"a": 0.0}, r"the weight 0\.0 of training set a .* must be above 0"),
        ({"a": 1.0, "b": -1.0}, r"the weight -1\.0 of training set b"),
        ({"a": math.nan}, "the weight nan"),
        ({"a": math.inf}, "the weight inf"),
        ({"a": 1.0, "b": 1e-5}, r"the weight 1e-05 of training set b .* too small: with 1e-05"),
        ({f"s{n}": 1.0 for n in range(4097)}, "too small"),
    ],
)
def test_bad_weights_are_refused_by_name(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_quotas(weights)
