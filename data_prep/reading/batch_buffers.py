"""Memory in which loader workers decode their batches and the parent reads them, batch after batch.

A worker's batch usually comes in fresh shared memory, whose pages the kernel has to find, clear and
drop again: on the machine where it was measured that took a worker half as long as the decoding of
JPEGs. Here the memory is made once, before the workers are forked, so that both sides see it; only
its number passes between them. It is anonymous: no limit of /dev/shm applies.
"""

from __future__ import annotations

import math
import mmap
import weakref
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from tvr.data_prep.records import Batch

# Of each worker: those of the batches it may make ahead (torch's prefetch_factor is 2), that which
# it is making, and one that the parent still reads. With none left a batch gets memory of its own.
SLOTS_PER_WORKER = 4


@dataclass(frozen=True, slots=True)
class BatchSlot:
    """Where the frames of one batch may lie."""

    frames: Tensor
    """(B, F, S, S, 3) uint8, uninitialised."""
    number: int | None = None
    """Of lent memory; none: it is the batch's own."""


@dataclass(frozen=True, slots=True)
class BatchInSlot:
    """A batch on its way to the parent, without its frames, which lie in a room."""

    batch: Batch
    number: int


class BatchSlots:
    """Slots of `shape` (B, F, S, S, 3) for the workers of one loader; made before they start."""

    def __init__(self, workers: int, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._num_bytes = math.prod(shape)
        # Pages of rooms that are never used are never made.
        self._memory = mmap.mmap(-1, workers * SLOTS_PER_WORKER * max(1, self._num_bytes))
        self._taken = mmap.mmap(-1, max(1, workers * SLOTS_PER_WORKER))

    def take(self, count: int) -> BatchSlot:
        """A room for a batch of `count` in the worker that asks; of its own where none is free."""
        worker = get_worker_info()
        if worker is not None and count == self._shape[0]:
            # The lowest free one, so that few are ever used. Nobody else takes this worker's.
            for number in range(worker.id * SLOTS_PER_WORKER, (worker.id + 1) * SLOTS_PER_WORKER):
                if not self._taken[number]:
                    self._taken[number] = 1
                    return BatchSlot(torch.from_numpy(self._array(number)), number)
        return private_slot((count, *self._shape[1:]))

    def send(self, batch: Batch, room: BatchSlot | None) -> Batch | BatchInSlot:
        """What a worker gives its parent."""
        if room is None or room.number is None:
            return batch
        if batch.frames.data_ptr() != room.frames.data_ptr():
            self._give_back(room.number)
            return batch
        return BatchInSlot(replace(batch, frames=batch.frames.new_empty(0)), room.number)

    def receive(self, sent: Batch | BatchInSlot) -> Batch:
        """In the parent: the batch. Its room is free again once no tensor shares its memory."""
        if isinstance(sent, Batch):
            return sent
        array = self._array(sent.number)
        # A tensor's storage holds the array that it was made from, and so do all views of it.
        weakref.finalize(array, self._give_back, sent.number).atexit = False
        return replace(sent.batch, frames=torch.from_numpy(array).permute(0, 1, 4, 2, 3))

    def _array(self, number: int) -> np.ndarray:
        offset = number * self._num_bytes
        flat = np.frombuffer(self._memory, np.uint8, self._num_bytes, offset)
        return flat.reshape(self._shape)

    def _give_back(self, number: int) -> None:
        self._taken[number] = 0


def private_slot(shape: tuple[int, ...]) -> BatchSlot:
    """Memory for one batch; in a worker it passes to the parent without a copy."""
    if get_worker_info() is None:
        return BatchSlot(torch.empty(shape, dtype=torch.uint8))
    # As torch's default_collate; a tensor moved to shared memory afterwards would be copied there.
    storage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
    return BatchSlot(torch.empty(0, dtype=torch.uint8).set_(storage).view(shape))
