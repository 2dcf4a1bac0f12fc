"""`World` records on the CPU."""

from __future__ import annotations

import torch

from tvr.trainer.distributed.world import World

CPU = torch.device("cpu")


def world_of(rank: int, world_size: int) -> World:
    """The world of one rank on the CPU, without joining a process group."""
    return World(rank=rank, world_size=world_size, device=CPU)


SINGLE_RANK = world_of(0, 1)
