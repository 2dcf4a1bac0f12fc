"""Staging of a training state in host memory: copied while the step waits, written to disk later.

The buffers are reused by the next save, because allocating fresh pages costs more than the copy.
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

from tvr.launchers.host_limits import host_memory
from tvr.trainer.config import CheckpointConfig
from tvr.trainer.distributed.shared_memory import ranks_on_node
from tvr.trainer.distributed.world import World


class Staging:
    """A checkpoint engine for DeepSpeed that saves to host memory and loads from disk.

    `save` touches no disk, so a disk that fails cannot leave other ranks waiting in a collective.
    """

    def __init__(self) -> None:
        self.copy = True
        """Copies tensors; if False, `save` keeps the training's own, which a step changes."""
        self._buffers: dict[str, Tensor] = {}
        self._staged: dict[str, Any] = {}

    def pop_files(self) -> dict[str, Any]:
        """Returns and forgets the saved states, by file name; valid until the next save begins."""
        staged, self._staged = self._staged, {}
        return staged

    def save(self, state_dict: Any, path: str) -> None:
        name = PurePath(path).name
        self._staged[name] = self._stage(state_dict, name)

    def load(self, path: str, map_location: Any = None) -> Any:
        # The files pickle DeepSpeed's own classes; their checksums have been verified.
        return torch.load(path, map_location=map_location, weights_only=False)

    def create(self, info: Any) -> None:
        """Does nothing: the saver makes the folder when it writes files."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Does nothing, as `create`."""

    def commit(self, info: Any) -> bool:
        return True

    def cleanup(self) -> None:
        """Does nothing: no file is open."""

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return False

    def _stage(self, value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            return self._copy(value.detach(), where) if self.copy else value.detach()
        if isinstance(value, dict):
            items = {key: self._stage(item, f"{where}/{key}") for key, item in value.items()}
            return type(value)(items)
        if isinstance(value, list):
            return [self._stage(item, f"{where}/{n}") for n, item in enumerate(value)]
        if type(value) is tuple:
            return tuple(self._stage(item, f"{where}/{n}") for n, item in enumerate(value))
        return value

    def _copy(self, tensor: Tensor, where: str) -> Tensor:
        buffer = self._buffers.get(where)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=_is_staged_pinned(tensor)
            )
            self._buffers[where] = buffer
        return buffer.copy_(tensor)


def staging_line(checkpoint: CheckpointConfig) -> str:
    """Describes in one line whether steps will wait for checkpoints to be written."""
    if not checkpoint.background:
        return "checkpoints: steps wait for the disk (checkpoint.background is off)"
    free = host_memory().available
    return (
        "checkpoints: written in the background, if copies of the state fit host memory"
        f" ({free / 1e9:.3g} GB are free here; `tvr train --dry-run` shows the size of a copy)"
    )


def pinned_bytes(num_bytes: int) -> int:
    """Host memory that torch allocates for a pinned tensor: the next power of two.

    Source: `CachingHostAllocatorImpl.allocate` in torch's aten/src/ATen/core. torch exempts large
    tensors if `pinned_max_round_threshold_mb` is set; the result is then too high.
    """
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def staged_bytes(state: Any) -> int:
    """Host memory that a copy of a state takes: each tensor has a buffer of its own."""
    return sum(
        pinned_bytes(leaf.nbytes) if _is_staged_pinned(leaf) else leaf.nbytes
        for leaf in tree_leaves(state)
        if isinstance(leaf, Tensor)
    )


def staging_shortage(state: Any, world: World) -> str | None:
    """Returns why copies of the ranks' states do not fit some machine's memory, or None if they do.

    All ranks call it and get the same answer. It reserves for the next step as much memory as the
    largest step so far used.

    Args:
        state: This rank's state, uncopied.
    """
    size = staged_bytes(state)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    coming = max(0, peak - psutil.Process().memory_info().rss)
    here = ranks_on_node(world)
    everyone = world.all_gather_objects((size, coming))
    copies, steps = (sum(everyone[rank][n] for rank in here) for n in (0, 1))
    free = host_memory().available
    short = None
    if copies + steps > free:
        short = (
            f"on {socket.gethostname()} {free / 1e9:.3g} GB are free, copies of its ranks' states"
            f" need {copies / 1e9:.3g} GB, and a step needs up to {steps / 1e9:.3g} GB more"
        )
    return next((line for line in world.all_gather_objects(short) if line), None)


def _is_staged_pinned(tensor: Tensor) -> bool:
    """True if the copy lies in pinned memory, to which a GPU copies at full speed."""
    return tensor.device.type == "cuda"
