"""Ranks that wait for rank 0, and values that it sends to all."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import torch
import torch.distributed as dist
from builders.spawn import join_gloo, spawn, started
from builders.worlds import world_of

from tvr.trainer.distributed.world import is_connection_error

SHORT_S = 3


def rejoin(rank: int, world_size: int, file: Path) -> None:
    """Replaces the group by one with a short time-out."""
    dist.destroy_process_group()
    # The time-out is also that of joining, so the ranks join at the same moment.
    file.with_name(f"{file.name}-{rank}").touch()
    while len(list(file.parent.glob(f"{file.name}-*"))) < world_size:
        time.sleep(0.01)
    join_gloo(file, rank, world_size, SHORT_S)


def wait_for_first(rank: int, world_size: int, folder: Path) -> list[str]:
    """Lets rank 0 work for longer than the time-out; returns how each kind of waiting ends."""
    world, ends = world_of(rank, world_size), []
    for patient in (False, True):
        rejoin(rank, world_size, folder / f"patient-{patient}")

        def work() -> str:
            time.sleep(2 * SHORT_S)
            return "done"

        try:
            ends.append(world.run_on_first(work, patient=patient))
        except RuntimeError as error:
            ends.append("timed out" if is_connection_error(error) else str(error))
    world.barrier()  # the group is whole again
    dist.destroy_process_group()
    return ends


def test_ranks_wait_for_the_first_beyond_the_time_out_if_patient(tmp_path: Path) -> None:
    for ends in spawn(wait_for_first, 3, tmp_path)[1:]:
        assert ends == ["timed out", "done"]


def lose_first(rank: int, world_size: int) -> bool:
    """Kills rank 0 while the others wait for it; returns what they notice."""
    try:
        world_of(rank, world_size).run_on_first(lambda: os._exit(7), patient=True)
    except RuntimeError as error:
        return is_connection_error(error)
    finally:
        dist.destroy_process_group()
    return False


def test_ranks_that_wait_without_time_out_notice_that_the_first_died() -> None:
    with started(lose_first, 3) as (ranks, folder):
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [7, 0, 0]
        assert all(pickle.loads((folder / f"value-{rank}").read_bytes()) for rank in (1, 2))


def receive(rank: int, world_size: int) -> list[list[float]]:
    world = world_of(rank, world_size)
    tensors = [torch.arange(6.0) + 10 * rank, (torch.arange(6.0) * rank).view(2, 3).t()]
    tensors.append(torch.tensor(7 + rank))
    world.broadcast_from_first(tensors)
    return [tensor.flatten().tolist() for tensor in tensors]


def test_tensors_of_the_first_rank_reach_all() -> None:
    expected = [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 6, [7]]
    assert spawn(receive, 3) == [expected] * 3
