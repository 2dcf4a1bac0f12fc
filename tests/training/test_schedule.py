"""The learning rate as a function of the step."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvr.trainer.engine.schedule import learning_rate_factor


def factors(warmup_steps: int, steps: int) -> list[float]:
    return [
        learning_rate_factor(step, warmup_steps=warmup_steps, steps=steps) for step in range(steps)
    ]


def test_linear_warm_up_to_the_peak_then_a_cosine_to_zero() -> None:
    got = factors(4, 12)
    assert got[:4] == [0.25, 0.5, 0.75, 1.0]
    assert got[4] == 1.0
    assert got[6] == pytest.approx(0.5 + 0.5 * 2**-0.5)  # a quarter of the way down
    assert got[8] == pytest.approx(0.5)
    assert got[10] == pytest.approx(0.5 - 0.5 * 2**-0.5)
    assert 0 < got[11] < 0.05
    assert learning_rate_factor(12, warmup_steps=4, steps=12) == 0.0


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    got = factors(0, 10)
    assert got[0] == 1.0
    assert got[5] == pytest.approx(0.5)


def test_beyond_the_end_the_rate_stays_zero() -> None:
    for step in (10, 11, 1000):
        assert learning_rate_factor(step, warmup_steps=2, steps=10) == 0.0


def test_a_warm_up_as_long_as_the_run_only_rises() -> None:
    assert factors(5, 5) == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors(10, 3) == [0.1, 0.2, 0.3]


@given(st.integers(0, 50), st.integers(1, 200))
def test_it_rises_then_falls_within_0_and_1(warmup_steps: int, steps: int) -> None:
    got = factors(warmup_steps, steps)
    up, down = got[:warmup_steps], got[warmup_steps:]
    assert all(before < after for before, after in pairwise(up))
    assert all(before > after for before, after in pairwise(down))
    assert all(0 < factor <= 1 for factor in got)
    if down:
        assert down[0] == max(got) == 1.0
