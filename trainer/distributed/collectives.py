"""Differentiable collectives over ranks, and the rule for the scale of gradients.

Gradient scale. The loss of the global batch is the SUM of the ranks' shares (`kernels.losses`).
The backward of every collective is its adjoint: all-gather's is a reduce-scatter that sums, and
the sum's is a sum. After `backward`, the parameter gradients of all ranks therefore SUM to the
gradient of the global loss. DeepSpeed AVERAGES gradients over ranks, so `loss.objective`
multiplies each rank's share by the number of ranks. No other place scales a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from tvr.kernels.row_loss.online_softmax import SINGLE_RANK, Collectives
from tvr.trainer.distributed.world import World
from tvr.trainer.versions.versions import renamed


def all_gather_rows(mine: Tensor, world: World, counts: Sequence[int]) -> Tensor:
    """Gathers the rows of all ranks, in rank order; differentiable.

    Args:
        mine: (B, ...) this rank's rows; B may differ between ranks and may be 0.
        counts: Number of rows of each rank, from `World.all_gather_counts`.

    Returns:
        (G, ...) the rows of all ranks; their gradient flows back to the rank that owns them.
    """
    return mine if world.world_size == 1 else _GatherRows.apply(mine, world, tuple(counts))


def all_gather_rows_no_grad(mine: Tensor, world: World, counts: Sequence[int]) -> Tensor:
    """`all_gather_rows` without gradient: one collective; rows are padded where counts differ."""
    most = max(counts)
    if most == 0:
        return mine
    everyone = mine.new_empty(len(counts) * most, *mine.shape[1:])
    renamed(dist, "all_gather_single")(everyone, _pad_rows(mine, most))
    world.received_bytes["all_gather"] += everyone.nbytes * (len(counts) - 1) // len(counts)
    if min(counts) == most:
        return everyone
    padded = everyone.split(most)
    return torch.cat([rows[:count] for rows, count in zip(padded, counts, strict=True)])


def reduce_scatter_rows(everyones: Tensor, world: World, counts: Sequence[int]) -> Tensor:
    """Sums `everyones` (G, ...) over ranks and returns this rank's rows (B, ...), no gradient.

    It is the adjoint of `all_gather_rows`.
    """
    most = max(counts)
    if most == 0:
        return everyones
    if min(counts) < most:
        everyones = torch.cat([_pad_rows(rows, most) for rows in everyones.split(list(counts))])
    mine = everyones.new_empty(most, *everyones.shape[1:])
    renamed(dist, "reduce_scatter_single")(mine, everyones.contiguous())
    world.received_bytes["reduce_scatter"] += mine.nbytes * (len(counts) - 1)
    return mine[: counts[world.rank]]


def sum_over_ranks(x: Tensor, world: World) -> Tensor:
    """Returns the sum of `x` over ranks, equal on all ranks; no gradient."""
    return x if world.world_size == 1 else _all_reduce(x, dist.ReduceOp.SUM, world)


def loss_collectives(world: World) -> Collectives:
    """Returns the reductions over ranks that the losses of `kernels` take."""
    return SINGLE_RANK if world.world_size == 1 else _OverRanks(world)


class _OverRanks:
    def __init__(self, world: World) -> None:
        self._world = world

    def sum(self, x: Tensor) -> Tensor:
        return _SumOverRanks.apply(x, self._world)

    def max(self, x: Tensor) -> Tensor:
        return _all_reduce(x, dist.ReduceOp.MAX, self._world)


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
        return _all_reduce(x, dist.ReduceOp.SUM, world)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return _all_reduce(gradient, dist.ReduceOp.SUM, ctx.world), None


def _all_reduce(x: Tensor, operation: Any, world: World) -> Tensor:
    result = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=operation)
    # A ring all-reduce receives everything but one rank's part, twice.
    world.received_bytes["all_reduce"] += (
        2 * result.nbytes * (world.world_size - 1) // world.world_size
    )
    return result


def _pad_rows(rows: Tensor, length: int) -> Tensor:
    if len(rows) == length:
        return rows.contiguous()
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded
