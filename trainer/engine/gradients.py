"""The gradient that DeepSpeed is about to apply: this rank's part of it, after its reduction.

At the end of the last backward of a step, each stage keeps the reduced gradient in another place.
This module knows these places, and imports nothing of DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tvr.trainer.distributed.collectives import sum_over_ranks
from tvr.trainer.distributed.world import World


def global_norm(engine: Any, zero_stage: int, world: World) -> Tensor:
    """Returns the Euclidean norm of the whole reduced gradient; all ranks call it.

    Args:
        engine: A DeepSpeed engine after the last backward of a step, before `engine.step`.

    Returns:
        A 0-dim float32 tensor on the rank's device, equal on all ranks. It is NaN or infinite if
        any number of the gradient is, on any rank. Nothing is read by the host.
    """
    squares = _sum_of_squares(_reduced_gradients(engine, zero_stage), world.device)
    total = sum_over_ranks(squares, world)
    # At stage 0 every rank holds the whole gradient, so the sum has it once for each rank.
    return (total / world.world_size if zero_stage == 0 else total).sqrt()


def _reduced_gradients(engine: Any, zero_stage: int) -> list[Tensor]:
    """This rank's part of the gradient; at stage 0 all of it."""
    optimizer = engine.optimizer
    if zero_stage == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # DeepSpeed's BF16_Optimizer
        return list(optimizer.fp32_groups_gradient_flat_partition)
    if zero_stage == 3:
        if optimizer.offload_optimizer:
            return _gradients_of(optimizer.fp32_partitioned_groups_flat)
        return _flat(optimizer.averaged_gradients.values())
    if optimizer.cpu_offload:
        # The copies to host memory run beside the backward.
        optimizer._wait_for_offload_copies()
        return _gradients_of(optimizer.single_partition_of_fp32_groups)
    return _flat(optimizer.averaged_gradients.values())


def _sum_of_squares(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(list(gradients), 2)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack([norm.float() for norm in norms]).square().sum().to(device)


def _gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _flat(groups: Iterable[Sequence[Tensor] | None]) -> list[Tensor]:
    return [gradient for group in groups if group is not None for gradient in group]
