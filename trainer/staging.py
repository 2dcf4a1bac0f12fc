"""A copy of a training state in host memory, made while the step waits; written out later.

The memory is kept from one save to the next: fresh pages cost more than the copy itself.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor


class Staging:
    """What DeepSpeed's engine takes for its checkpoint engine: saving copies, loading reads.

    Nothing here touches a disk while saving, so that no disk's failure reaches a collective.
    """

    def __init__(self) -> None:
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
            return self._copy(value.detach(), where)
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
