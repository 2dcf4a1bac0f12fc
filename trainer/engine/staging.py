"""A copy of a training state in host memory, made while the step waits; written out later.

The memory is kept from one save to the next: fresh pages cost more than the copy itself.
"""

from __future__ import annotations

import resource
import socket
from pathlib import PurePath
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tvr.trainer.config import CheckpointConfig
from tvr.trainer.distributed.shared_memory import ranks_on_node
from tvr.trainer.distributed.world import World


class Staging:
    """What DeepSpeed's engine takes for its checkpoint engine: saving copies, loading reads.

    Nothing here touches a disk while saving, so that no disk's failure reaches a collective.
    """

    def __init__(self) -> None:
        self.copies = True
        """Whether to copy tensors; if not, they are the training's own, which a step changes."""
        self._buffers: dict[str, Tensor] = {}
        self._staged: dict[str, Any] = {}

    def take(self) -> dict[str, Any]:
        """What was saved since the last call, by file name; valid until the next save begins."""
        staged, self._staged = self._staged, {}
        return staged

    def save(self, state_dict: Any, path: str) -> None:
        name = PurePath(path).name
        self._staged[name] = self._copied(state_dict, name)

    def load(self, path: str, map_location: Any = None) -> Any:
        # Pickles of DeepSpeed's own classes; their checksums were verified before.
        return torch.load(path, map_location=map_location, weights_only=False)

    def create(self, info: Any) -> None:
        """Nothing: the folder is made when files are written."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing, likewise."""

    def commit(self, info: Any) -> bool:
        return True

    def cleanup(self) -> None:
        """Nothing is held open."""

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return False

    def _copied(self, value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            return self._copy(value.detach(), where) if self.copies else value.detach()
        if isinstance(value, dict):
            items = {key: self._copied(item, f"{where}/{key}") for key, item in value.items()}
            return type(value)(items)
        if isinstance(value, list):
            return [self._copied(item, f"{where}/{n}") for n, item in enumerate(value)]
        if type(value) is tuple:
            return tuple(self._copied(item, f"{where}/{n}") for n, item in enumerate(value))
        return value

    def _copy(self, tensor: Tensor, where: str) -> Tensor:
        buffer = self._buffers.get(where)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[where] = buffer
        return buffer.copy_(tensor)


def staging_line(checkpoint: CheckpointConfig) -> str:
    """Whether steps wait for checkpoints, as far as that is known before there is a state."""
    if not checkpoint.background:
        return "checkpoints: steps wait for the disk, as checkpoint.background is off"
    free = psutil.virtual_memory().available
    return (
        "checkpoints: written in the background, if copies of the state fit host memory"
        f" ({free / 1e9:.3g} GB are free here; `tvr train --dry-run` tells a copy's size)"
    )


def staging_shortage(state: Any, world: World) -> str | None:
    """Why copies of the ranks' states do not fit the memory of some machine; none where they do.

    A step is taken to need again what steps needed so far at their worst. The answer is the same
    on all ranks, which all call it.
    """
    size = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    coming = max(0, peak - psutil.Process().memory_info().rss)
    here = ranks_on_node(world)
    everyone = world.all_gather_objects((size, coming))
    copies, steps = (sum(everyone[rank][n] for rank in here) for n in (0, 1))
    free = psutil.virtual_memory().available
    short = None
    if copies + steps > free:
        short = (
            f"on {socket.gethostname()} {free / 1e9:.3g} GB are free, copies of its ranks' states"
            f" take {copies / 1e9:.3g} GB, and a step up to {steps / 1e9:.3g} GB more"
        )
    return next((line for line in world.all_gather_objects(short) if line), None)
