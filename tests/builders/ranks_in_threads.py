"""Ranks as threads of one process, for the row losses without process groups."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class ThreadCollectives:
    """Collectives of one of `world_size` threads, which must call them in the same order."""

    def __init__(self, rank: int, slots: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank, self.slots, self.barrier = rank, slots, barrier

    def sum(self, x: Tensor) -> Tensor:
        return _Sum.apply(x, self)

    def max(self, x: Tensor) -> Tensor:
        return torch.stack(self.gather(x.detach())).amax(dim=0)

    def gather(self, x: Tensor) -> list[Tensor]:
        self.slots[self.rank] = x
        self.barrier.wait(timeout=30)
        values = [slot for slot in self.slots if slot is not None]
        self.barrier.wait(timeout=30)
        return values


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, collectives: ThreadCollectives) -> Tensor:
        ctx.collectives = collectives
        return torch.stack(collectives.gather(x)).sum(dim=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.stack(ctx.collectives.gather(gradients[0])).sum(dim=0), None


def on_ranks(work: Callable[[ThreadCollectives, int], Any], world_size: int) -> Sequence[Any]:
    """Runs work(collectives, rank) on every rank; returns the results in rank order."""
    barrier = threading.Barrier(world_size)
    slots: list[Tensor | None] = [None] * world_size

    def run(rank: int) -> Any:
        try:
            return work(ThreadCollectives(rank, slots, barrier), rank)
        except BaseException:
            barrier.abort()  # the others must not wait for a rank that failed
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))
