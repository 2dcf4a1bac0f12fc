"""Collectives that carry gradients, and the one rule about their scale.

The scale rule. The loss of the global batch is the SUM of the ranks' shares (`kernels.losses`).
Every collective here has its adjoint as backward: a gather's is a reduce-scatter that sums, a
sum's is a sum. So after `backward`, the ranks' parameter gradients SUM to the gradient of the
global loss. DeepSpeed AVERAGES gradients over ranks; `objective` therefore multiplies each share
by the number of ranks, there and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from tvr.kernels.losses import ALONE, Collectives
from tvr.trainer.world import World


def gather_rows(mine: Tensor, world: World) -> Tensor:
    """All ranks' rows (B, ...) in rank order, (G, ...); floating tensors keep their gradient.

    Every rank must hold the same number of rows.
    """
    return mine if world.world_size == 1 else _GatherRows.apply(mine, world.world_size)


def gather_uneven(mine: Tensor, world: World) -> list[Tensor]:
    """Each rank's tensor, without gradient; the first dimension may differ between ranks."""
    if world.world_size == 1:
        return [mine]
    lengths = world.gather_objects(len(mine))
    padded = mine.new_zeros(max(lengths), *mine.shape[1:])
    padded[: len(mine)] = mine
    everyone = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(everyone, padded)
    return [rows[:length] for rows, length in zip(everyone, lengths, strict=True)]


def collectives_of(world: World) -> Collectives:
    """The reductions over ranks that the losses ask for."""
    return ALONE if world.world_size == 1 else _OverRanks()


class _OverRanks:
    def sum(self, x: Tensor) -> Tensor:
        return _SumOverRanks.apply(x)

    def max(self, x: Tensor) -> Tensor:
        result = x.detach().clone()
        dist.all_reduce(result, op=dist.ReduceOp.MAX)
        return result


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, mine: Tensor, world_size: int) -> Tensor:
        everyone = mine.new_empty(world_size * len(mine), *mine.shape[1:])
        dist.all_gather_single(everyone, mine.contiguous())
        return everyone

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        world_size = dist.get_world_size()
        mine = gradient.new_empty(len(gradient) // world_size, *gradient.shape[1:])
        dist.reduce_scatter_single(mine, gradient.contiguous())
        return mine, None


class _SumOverRanks(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return _summed(gradient)


def _summed(x: Tensor) -> Tensor:
    result = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result)
    return result
