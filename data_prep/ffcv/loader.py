"""FFCV's Loader as the source of a rank's training batches.

Its threads read and decode whole batches ahead; what happens to a sample thereafter is the code of
every other source, and so are the order, the draws and the rules for bad samples: a sample that
FFCV's side does not give intact is read again by the reader, which says what is wrong with it.
Importing it needs FFCV.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from queue import Empty
from typing import Any

import numpy as np
import torch
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.traversal_order.base import TraversalOrder

from tvr.data_prep.ffcv.field import JpegStackDecoder, JpegStackField, TextDecoder
from tvr.data_prep.ffcv.optional_import import max_threads
from tvr.data_prep.reading.batch_buffers import BatchSlot
from tvr.data_prep.reading.order import SampleOrder
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.reading.worker import BatchCollator, PositionBatches, TrainingDataset
from tvr.data_prep.records import Batch, ShardCorrupt
from tvr.data_prep.storage.storage import Storage

# The endless stream is given to FFCV in epochs of about so many samples: it wants the order of an
# epoch as a list, and starts each with an empty queue.
EPOCH_SAMPLES = 1 << 14
POLL_S = 1.0


def beton_batches(
    reader: SampleReader,
    order: SampleOrder,
    rows: TrainingDataset,
    runs: PositionBatches,
    join: BatchCollator,
    threads: int,
) -> Iterator[Batch]:
    """A batch for each run of stream positions, read and decoded by `threads` threads of FFCV (one
    at least, and no more than the machine's cores).

    Raises, at the call, ValueError for a remote data set and ShardCorrupt for a file that is not
    there or not whole.
    """
    path = _checked_path(reader)
    epochs = _Epochs(order, runs, max(1, EPOCH_SAMPLES // runs.length))
    with _torch_threads_kept():
        loader = Loader(
            path,
            batch_size=runs.length,
            num_workers=max(1, min(threads, max_threads())),
            os_cache=True,
            order=epochs,
            seed=0,  # else it draws one from numpy's global generator
            pipelines={"frames": [JpegStackDecoder()], "text": [TextDecoder()]},
            custom_fields={"frames": JpegStackField},
        )
    return _batches(loader, epochs, reader, rows, join)


class _Epochs(TraversalOrder):
    """The rows of one run of stream positions after another, as epochs of `length` runs."""

    def __init__(self, order: SampleOrder, runs: PositionBatches, length: int) -> None:
        self._order = order
        self._runs = iter(runs)
        self._length = length
        self._epoch = -1
        self.positions: list[list[int]] = []
        """Of each batch of the epoch asked for last."""
        self.rows: list[list[int]] = []

    def __call__(self, loader: Loader) -> _Epochs:
        return self  # FFCV calls what it is given as the order

    def sample_order(self, epoch: int) -> Any:
        if epoch != self._epoch:  # the first one is asked for twice
            self._epoch = epoch
            self.positions = list(islice(self._runs, self._length))
            self.rows = [
                [self._order.locate(position).sample for position in run] for run in self.positions
            ]
        return np.array(self.rows, dtype=np.uint64).ravel()


def _batches(
    loader: Loader,
    epochs: _Epochs,
    reader: SampleReader,
    rows: TrainingDataset,
    join: BatchCollator,
) -> Iterator[Batch]:
    while True:
        for index, result in enumerate(_decoded(loader)):
            (frames, _, _), _ = result
            reader.hold(_intact(loader, reader, epochs.rows[index], result), _room(reader, frames))
            batch = join([rows[position] for position in epochs.positions[index]])
            assert isinstance(batch, Batch), "no rooms are lent here: FFCV's frames have their own"
            yield batch


def _room(reader: SampleReader, frames: np.ndarray) -> BatchSlot | None:
    """The frames of a batch as they lie, where every sample is stored in the size wanted."""
    shape = (reader.num_frames, reader.image_size, reader.image_size, 3)
    whole = frames.shape[1] == math.prod(shape)
    return BatchSlot(torch.from_numpy(frames).view(-1, *shape)) if whole else None


def _intact(
    loader: Loader, reader: SampleReader, rows: list[int], result: Any
) -> dict[int, tuple[bytes, np.ndarray]]:
    """JSON and frames (F, H, W, 3) of the rows that FFCV's side decoded from the packed bytes."""
    (frames, crc32, decoded), texts = result
    stacks, sizes = (loader.reader.metadata[name] for name in ("f0", "f1"))  # by order of fields
    samples = {}
    for index, row in enumerate(rows):
        text = texts[index, : sizes["size"][row]].tobytes()
        if decoded[index] and zlib.crc32(text, crc32[index]) == reader.manifest.samples.crc32[row]:
            shape = (*(int(stacks[name][row]) for name in ("frames", "height", "width")), 3)
            samples[row] = text, frames[index, : math.prod(shape)].reshape(shape)
    return samples


def _decoded(loader: Loader) -> Iterator[Any]:
    """What FFCV gives for the batches of its next epoch."""
    with _torch_threads_kept():
        epoch = iter(loader)
        result = _next(epoch)
    try:
        while result is not None:
            yield result
            result = _next(epoch)
    finally:
        epoch.close()  # else its thread would live on, waiting for somebody to take a batch


def _next(epoch: EpochIterator) -> Any:
    """The next batch or None. FFCV's own `next` would wait for ever for a thread that has died."""
    while True:
        alive = epoch.is_alive()
        try:
            taken = epoch.output_queue.get(timeout=POLL_S)
        except Empty:
            if not alive:
                raise RuntimeError("FFCV's thread failed; its traceback is on stderr") from None
        else:
            return None if taken is None else taken[1]


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """FFCV gives torch its own number of threads when a loader or an epoch starts."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _checked_path(reader: SampleReader) -> str:
    store, beton = Storage(reader.url), reader.manifest.beton
    assert beton is not None
    if not store.is_local:
        raise ValueError(
            f"{reader.url}: FFCV maps a beton into memory, so it must be a local folder; copy it"
            " to the node's disk, or train from shards"
        )
    path = store.path(beton.name)
    num_bytes = os.path.getsize(path) if os.path.exists(path) else 0
    if num_bytes != beton.shard_bytes:
        # A shorter file would end the process: memory behind a file's end cannot be read.
        raise ShardCorrupt(
            f"{path}: {num_bytes} of {beton.shard_bytes} bytes are there; make it again"
        )
    return path
