"""Ranks on the CPU without a process group: alone, or as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from tvr.trainer.distributed.world import World

CPU = torch.device("cpu")
TIMEOUT_S = 60.0

T = TypeVar("T")


def world_of(rank: int, world_size: int) -> World:
    """The world of one rank on the CPU, without joining a process group."""
    return World(rank=rank, world_size=world_size, device=CPU)


SINGLE_RANK = world_of(0, 1)


class ThreadWorld(World):
    """One rank of several that are threads of this process; it exchanges small values only."""

    def __init__(
        self, rank: int, world_size: int, values: list[Any], meeting: threading.Barrier
    ) -> None:
        super().__init__(rank=rank, world_size=world_size, device=CPU)
        # The class is frozen, and its dataclass has no place for more.
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_meeting", meeting)

    def barrier(self) -> None:
        self._meeting.wait(TIMEOUT_S)

    def all_gather_objects(self, mine: Any) -> list[Any]:
        self._values[self.rank] = mine
        self.barrier()
        everyone = list(self._values)
        self.barrier()
        return everyone

    def run_on_first(self, action: Callable[[], T], *, patient: bool = False) -> T:
        value = action() if self.is_first else None
        return self.all_gather_objects(value)[0]


def on_thread_ranks(world_size: int, work: Callable[[ThreadWorld], T]) -> list[T]:
    """Runs `work` on every rank, in threads; returns the values in rank order."""
    meeting = threading.Barrier(world_size)
    values: list[Any] = [None] * world_size

    def run(rank: int) -> T:
        try:
            return work(ThreadWorld(rank, world_size, values, meeting))
        except BaseException:
            meeting.abort()  # the others must not wait for a rank that failed
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))
