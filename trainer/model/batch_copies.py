"""Copies of batches to a GPU, which run beside its computation.

The copies have a stream of their own, and come from memory that is pinned (`pin_pages`), so neither
the host nor the computation waits for them until a batch is needed. The frames lie in memory that
the loader lends (`data_prep.reading.batch_buffers`) and takes back when no tensor uses it.
`BatchCopies` therefore keeps each batch until the event behind its copy has passed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tvr.data_prep.records import Batch
from tvr.trainer.model.model import host_inputs, model_inputs

# Batches whose copy may be under way: more would take memory from the loader's workers.
MAX_IN_FLIGHT = 2
# Smaller tensors go through pinned memory of torch's allocator.
SMALL_BYTES = 2**20

log = logging.getLogger(__name__)


class CopyEvent(Protocol):
    """The point in a stream behind a copy, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """True once the copy is done."""
        ...

    def synchronize(self) -> None:
        """Waits until the copy is done."""
        ...


class CopyStream(Protocol):
    """Copies host tensors to a device in the background."""

    def copy(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], CopyEvent]:
        """Starts copies; the device's computation waits for them, the host does not.

        Returns:
            The copies, and the event behind them. The tensors must not change before it.
        """
        ...


class BatchCopies:
    """Moves batches to the device, and keeps their host memory until the copies are done.

    Args:
        stream: Makes the copies; None takes a new stream on a GPU, and no stream elsewhere.
    """

    def __init__(self, stream: CopyStream | None = None) -> None:
        self._stream = stream
        self._in_flight: deque[tuple[CopyEvent, Sequence[Tensor]]] = deque()

    def model_inputs(
        self, batch: Batch, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of the model's forward on the device."""
        if self._stream is None:
            if device.type != "cuda":
                return model_inputs(batch, device)
            self._stream = CudaCopyStream(device)
        self._release()
        tensors = host_inputs(batch)
        (frames, frame_mask, token_ids, word_mask), copied = self._stream.copy(tensors)
        self._in_flight.append((copied, tensors))
        return frames, frame_mask, token_ids, word_mask

    def _release(self) -> None:
        """Lets go of batches whose copy is done; waits for the oldest if too many are under way.

        The copies wait for nothing but each other, so this does not wait for the computation.
        """
        while self._in_flight:
            copied, _ = self._in_flight[0]
            if not copied.query():
                if len(self._in_flight) < MAX_IN_FLIGHT:
                    return
                copied.synchronize()
            self._in_flight.popleft()


class CudaCopyStream:
    """`CopyStream` of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], torch.cuda.Event]:
        """Starts copies; see `CopyStream`."""
        with torch.cuda.stream(self._stream):
            copies = tuple(self._copy(x) for x in tensors)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        computation = torch.cuda.current_stream(self._device)
        computation.wait_event(copied)
        for x in copies:
            # Its memory belongs to the copies' stream; the computation must be done with it, too.
            x.record_stream(computation)
        return copies, copied

    def _copy(self, x: Tensor) -> Tensor:
        if x.nbytes <= SMALL_BYTES and not x.is_pinned():
            x = x.pin_memory()
        return x.to(self._device, non_blocking=True)


def pin_pages(address: int, num_bytes: int) -> Callable[[], None] | None:
    """Pins host memory for copies to the GPU.

    Returns:
        A function that unpins it; None if CUDA refuses, with a warning. The host then waits for
        each copy.
    """
    cudart: Any = torch.cuda.cudart()
    error = int(cudart.cudaHostRegister(address, num_bytes, 0))
    if error == 0:
        return lambda: cudart.cudaHostUnregister(address)
    log.warning(
        "CUDA error %d: the loader's memory (%d bytes) cannot be pinned, so the host waits for"
        " copies of batches to the GPU; see `ulimit -l`",
        error,
        num_bytes,
    )
    try:
        # CUDA keeps the error until the next kernel, which would raise it as its own.
        torch.zeros(1, device="cuda")
    except RuntimeError:
        pass
    return None
