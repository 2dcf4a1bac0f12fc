"""ZeRO-3 partitions a model parameter by parameter, so that no device ever holds all of it.

Rank 0 builds the model in host memory. The other ranks build it without memory for its parameters,
and get each from rank 0 just before it is partitioned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tvr.trainer.distributed.world import World


def partition_model(
    model: nn.Module, deepspeed: Any, settings: Mapping[str, Any], world: World
) -> None:
    """Replaces every parameter by this rank's part of it, in place; all ranks call it.

    Args:
        model: With rank 0's values; on the other ranks only the shapes count.
        deepspeed: The package, initialised.
        settings: DeepSpeed's configuration.
    """
    _broadcast_buffers(model, world)
    dtype = torch.bfloat16 if settings["bf16"]["enabled"] else torch.float32
    first: Any = None
    for parameter in model.parameters():
        if world.is_first:
            parameter.data = parameter.data.to(world.device, dtype)
        else:
            parameter.data = torch.empty(parameter.shape, dtype=dtype, device=world.device)
        if first is None:
            first = parameter
            holder = nn.ParameterList([parameter])
            deepspeed.zero.Init(module=holder, config_dict_or_path=dict(settings), dtype=dtype)
        else:
            # As DeepSpeed does with the parameters that zero.Init has not seen.
            first.convert_to_zero_parameters(param_list=[parameter])


def _broadcast_buffers(model: nn.Module, world: World) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(world.device)
    world.broadcast_from_first(model.buffers())
