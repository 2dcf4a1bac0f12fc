"""`spawn`: returns values, reports failures, and ends ranks that take too long."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from builders.spawn import spawn


def add_up(rank: int, world_size: int, offset: int) -> tuple[int, torch.Tensor, str]:
    total = torch.tensor([float(rank + offset)])
    dist.all_reduce(total)
    return rank, total, os.environ["LOCAL_RANK"] + os.environ["WORLD_SIZE"]


def fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("the cause")
    dist.barrier()


def exit_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def sleep_on_one(rank: int, world_size: int) -> None:
    time.sleep(600 * rank)


def test_values_are_in_rank_order() -> None:
    values = spawn(add_up, 2, 10)
    assert values == [(0, torch.tensor([21.0]), "02"), (1, torch.tensor([21.0]), "12")]


def test_a_ranks_traceback_reaches_the_caller() -> None:
    with pytest.raises(RuntimeError, match=r"^rank 1:(?s:.*)in fail_on_one(?s:.*)the cause"):
        spawn(fail_on_one, 2)


def test_a_rank_that_exits_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"^rank 1 ended with exit code 7"):
        spawn(exit_on_one, 2)


def test_a_late_rank_is_named_and_killed() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[(0, )?1\] not done after 4\.0 s"):
        spawn(sleep_on_one, 2, timeout_s=4.0)
