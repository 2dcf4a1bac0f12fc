"""Shared memory into which loader workers decode frames, reused from batch to batch.

By default a worker returns each batch in newly allocated shared memory, and the kernel has to
allocate, clear and free its pages. On the machine where this was measured, that took a worker half
as long as decoding the JPEGs. Here the memory is allocated once, before the workers are forked, so
that workers and parent map the same pages and only a slot number is sent between them. The memory
is anonymous, so the size limit of /dev/shm does not apply.

For a GPU the parent pins the slots, so that batches are copied from them without another copy.
Whoever copies a batch in the background keeps its frames until the copy is done: a slot is free
when no tensor uses it.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from tvr.data_prep.records import Batch

# Two prefetched batches (torch's prefetch_factor), one in preparation, and one in use by the
# parent. A worker without a free slot allocates memory for its batch.
SLOTS_PER_WORKER = 4

PinPages: TypeAlias = Callable[[int, int], Callable[[], None] | None]
"""Address and bytes of pages -> a function that unpins them, or None if they cannot be pinned."""


@dataclass(frozen=True, slots=True)
class BatchSlot:
    """Memory for the frames of one batch."""

    frames: Tensor
    """(B, F, S, S, 3) uint8, uninitialised."""
    number: int | None = None
    """Number in the pool; None = memory that belongs to this batch alone."""


@dataclass(frozen=True, slots=True)
class BatchInSlot:
    """A batch sent from a worker to its parent; its frames stay in a slot of the pool."""

    batch: Batch
    """Without frames."""
    slot_number: int


class BatchSlots:
    """Pool of batch slots for the workers of one loader; create it before the workers start.

    Args:
        workers: Number of loader workers.
        shape: Frames of a full batch, (B, F, S, S, 3).
        pin: Pins memory for copies to a GPU. The parent calls it for a slot when its first batch
            arrives, so unused slots stay unpinned.
    """

    def __init__(self, workers: int, shape: tuple[int, ...], pin: PinPages | None = None) -> None:
        self._shape = shape
        self._num_bytes = math.prod(shape)
        # Whole pages, because two slots that share a page could not both be pinned.
        self._slot_bytes = -(-max(1, self._num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        # Unused pages are never allocated.
        self._memory = _SharedPages(-1, max(1, workers * SLOTS_PER_WORKER) * self._slot_bytes)
        self._pin = pin
        self._pinned = set[int]()
        self._is_lent = mmap.mmap(-1, max(1, workers * SLOTS_PER_WORKER))

    def lend(self, count: int) -> BatchSlot:
        """Lends the calling worker a slot for `count` samples; allocates one if none is free."""
        worker = get_worker_info()
        if worker is not None and count == self._shape[0]:
            # Prefer the lowest free slot, so that few pages are touched. No other worker uses
            # this worker's slots, so no lock is needed.
            first = worker.id * SLOTS_PER_WORKER
            for number in range(first, first + SLOTS_PER_WORKER):
                if not self._is_lent[number]:
                    self._is_lent[number] = 1
                    return BatchSlot(torch.from_numpy(self._array(number)), number)
        return private_slot((count, *self._shape[1:]))

    def send(self, batch: Batch, slot: BatchSlot | None) -> Batch | BatchInSlot:
        """Prepares a batch for sending to the parent; called in a worker."""
        if slot is None or slot.number is None:
            return batch
        if batch.frames.data_ptr() != slot.frames.data_ptr():
            self._release(slot.number)
            return batch
        return BatchInSlot(replace(batch, frames=batch.frames.new_empty(0)), slot.number)

    def receive(self, sent: Batch | BatchInSlot) -> Batch:
        """Restores a sent batch in the parent; frees its slot when no tensor uses the memory."""
        if isinstance(sent, Batch):
            return sent
        array = self._array(sent.slot_number)
        self._pin_once(sent.slot_number, array)
        # The storage of a tensor, shared by all its views, holds a reference to the source array.
        weakref.finalize(array, self._release, sent.slot_number).atexit = False
        return replace(sent.batch, frames=torch.from_numpy(array).permute(0, 1, 4, 2, 3))

    def _pin_once(self, number: int, array: np.ndarray) -> None:
        if self._pin is None or number in self._pinned:
            return
        unpin = self._pin(array.ctypes.data, self._slot_bytes)
        if unpin is None:
            self._pin = None  # it would fail for the other slots too
        else:
            self._pinned.add(number)
            self._memory.unpin.append(unpin)

    def _array(self, number: int) -> np.ndarray:
        offset = number * self._slot_bytes
        flat = np.frombuffer(self._memory, np.uint8, self._num_bytes, offset)
        return flat.reshape(self._shape)

    def _release(self, number: int) -> None:
        self._is_lent[number] = 0


class _SharedPages(mmap.mmap):
    """Anonymous memory shared with forked processes; pinned parts are unpinned before its end."""

    def __init__(self, fileno: int, length: int) -> None:
        self.unpin = list[Callable[[], None]]()
        self._owner = os.getpid()

    def __del__(self) -> None:
        if os.getpid() == self._owner:
            for unpin in self.unpin:
                unpin()


def private_slot(shape: tuple[int, ...]) -> BatchSlot:
    """Allocates memory for one batch; a worker's batch reaches the parent without a copy."""
    if get_worker_info() is None:
        return BatchSlot(torch.empty(shape, dtype=torch.uint8))
    # As torch's default_collate does: moving a tensor to shared memory later would copy it.
    storage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
    return BatchSlot(torch.empty(0, dtype=torch.uint8).set_(storage).view(shape))
