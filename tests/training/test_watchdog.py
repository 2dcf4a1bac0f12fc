"""The watchdog's limit, and the rank that it reports as the cause of a stall."""

from __future__ import annotations

from typing import Any

import pytest

from tvr.trainer.config import TrainConfig
from tvr.trainer.resilience.watchdog import Phase, RankStatus, find_stalled_ranks, stall_limit_s

HOSTS = ["a", "a", "b"]


def status(rank: int, **changes: Any) -> RankStatus:
    fields = {"step": 12, "phase": "training", "in_collective": True, "line": "step:9 take"}
    return RankStatus(rank=rank, host=HOSTS[rank], **{**fields, **changes})


@pytest.mark.parametrize(
    ("phase", "times", "limit"),
    [
        ("start", [], 1800.0),
        ("training", [1.0, 1.0], 900.0),  # the first steps compile and read
        ("training", [50.0, 1.0, 1.0], 60.0),
        ("training", [50.0, 9.0, 10.0], 200.0),
        ("training", [100.0] * 9, 900.0),
        ("evaluation", [1.0] * 9, 900.0),
        ("checkpoint", [1.0] * 9, 900.0),
    ],
)
def test_limit_follows_the_median_step_within_bounds(
    phase: Phase, times: list[float], limit: float
) -> None:
    train = TrainConfig(steps=1, global_batch=1, micro_batch=1, timeout_s=900.0)
    assert stall_limit_s(train, phase, times) == limit


def test_rank_without_a_status_is_the_cause() -> None:
    stalled, text = find_stalled_ranks({0: status(0), 1: status(1, step=11)}, HOSTS)
    assert stalled == [2]
    assert text.startswith(
        "rank 2 on b does not respond (suspended or dead); the other ranks wait in training after"
    )


@pytest.mark.parametrize(
    "behind",
    [
        {"step": 11, "line": "stream:3 read"},
        {"phase": "evaluation", "line": "stream:3 read"},
        {"in_collective": False, "line": "stream:3 read"},
    ],
)
def test_rank_with_the_least_progress_is_the_cause(behind: dict[str, Any]) -> None:
    known = {0: status(0), 1: status(1, **behind), 2: status(2)}
    stalled, text = find_stalled_ranks(known, HOSTS)
    assert stalled == [1]
    assert text == (
        f"rank 1 on a is behind, {known[1].text()}; the other ranks wait in training after step 12"
        " (step:9 take)"
    )


def test_no_rank_is_the_cause_if_all_are_equally_far() -> None:
    known = {rank: status(rank) for rank in range(3)}
    expected = "all ranks are in training after step 12 (step:9 take)"
    assert find_stalled_ranks(known, HOSTS) == ([], expected)
