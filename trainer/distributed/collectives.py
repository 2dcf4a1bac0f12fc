"""Collectives that carry gradients, and the one rule about their scale.

The scale rule. The loss of the global batch is the SUM of the ranks' shares (`kernels.losses`).
Every collective here has its adjoint as backward: a gather's is a reduce-scatter that sums, a
sum's is a sum. So after `backward`, the ranks' parameter gradients SUM to the gradient of the
global loss. DeepSpeed AVERAGES gradients over ranks; `objective` therefore multiplies each share
by the number of ranks, there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from tvr.kernels.row_loss.online_softmax import ALONE, Collectives
from tvr.trainer.distributed.world import World


def all_gather_rows(mine: Tensor, world: World, counts: Sequence[int]) -> Tensor:
    """All ranks' rows (B, ...) in rank order, (G, ...); floating tensors keep their gradient.

    `counts` are the ranks' numbers of rows (`World.all_gather_counts`); a rank may have none.
    """
    return mine if world.world_size == 1 else _GatherRows.apply(mine, world, tuple(counts))


def all_gather_rows_no_grad(mine: Tensor, world: World, counts: Sequence[int]) -> Tensor:
    """`all_gather_rows` without gradient: one collective; rows are padded where counts differ."""
    most = max(counts)
    if most == 0:
        return mine
    everyone = mine.new_empty(len(counts) * most, *mine.shape[1:])
    dist.all_gather_single(everyone, _padded(mine, most))
    world.received_bytes["all_gather"] += everyone.nbytes * (len(counts) - 1) // len(counts)
    if min(counts) == most:
        return everyone
    padded = everyone.split(most)
    return torch.cat([rows[:count] for rows, count in zip(padded, counts, strict=True)])


def reduce_scatter_rows(everyones: Tensor, world: World, counts: Sequence[int]) -> Tensor:
    """The adjoint: this rank's rows of the sum over ranks of `everyones` (G, ...)."""
    most = max(counts)
    if most == 0:
        return everyones
    if min(counts) < most:
        everyones = torch.cat([_padded(rows, most) for rows in everyones.split(list(counts))])
    mine = everyones.new_empty(most, *everyones.shape[1:])
    dist.reduce_scatter_single(mine, everyones.contiguous())
    world.received_bytes["reduce_scatter"] += mine.nbytes * (len(counts) - 1)
    return mine[: counts[world.rank]]


def loss_collectives(world: World) -> Collectives:
    """The reductions over ranks that the losses ask for."""
    return ALONE if world.world_size == 1 else _OverRanks(world)


class _OverRanks:
    def __init__(self, world: World) -> None:
        self._world = world

    def sum(self, x: Tensor) -> Tensor:
        return _SumOverRanks.apply(x, self._world)

    def max(self, x: Tensor) -> Tensor:
        return _reduced(x, dist.ReduceOp.MAX, self._world)


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, world: World, counts: tuple[int, ...]) -> Tensor:
        ctx.world, ctx.counts = world, counts
        return all_gather_rows_no_grad(mine, world, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return reduce_scatter_rows(gradient, ctx.world, ctx.counts), None, None


class _SumOverRanks(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return _reduced(x, dist.ReduceOp.SUM, world)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return _reduced(gradient, dist.ReduceOp.SUM, ctx.world), None


def _reduced(x: Tensor, by: Any, world: World) -> Tensor:
    result = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=by)
    # A ring passes everything but one rank's part twice.
    world.received_bytes["all_reduce"] += (
        2 * result.nbytes * (world.world_size - 1) // world.world_size
    )
    return result


def _padded(rows: Tensor, length: int) -> Tensor:
    if len(rows) == length:
        return rows.contiguous()
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded
