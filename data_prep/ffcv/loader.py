"""FFCV's Loader as the source of a rank's training batches.

FFCV's threads read and decode whole batches ahead. All later processing, the order, the random
choices and the handling of bad samples use the same code as for shards. A sample that FFCV does not
deliver intact is read again by `SampleReader`, which determines the error.

Importing this module requires FFCV, see `optional_import`.
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
from tvr.data_prep.reading.locality import RankShare
from tvr.data_prep.reading.order import SampleLocation, SampleOrder
from tvr.data_prep.reading.sample_reader import SampleReader, StoredFrames
from tvr.data_prep.reading.worker import (
    BatchCollator,
    DrawnBatch,
    MicroSteps,
    TrainingDataset,
)
from tvr.data_prep.records import Batch, ShardCorrupt
from tvr.data_prep.storage.storage import Storage

# FFCV needs the order of an epoch as a list, and starts each epoch with an empty queue. The endless
# stream is therefore divided into FFCV epochs of about this many samples.
EPOCH_SAMPLES = 1 << 14
POLL_S = 1.0


def beton_batches(
    reader: SampleReader,
    order: SampleOrder,
    share: RankShare,
    dataset: TrainingDataset,
    steps: MicroSteps,
    collator: BatchCollator,
    threads: int,
) -> Iterator[Batch]:
    """Yields a batch for each micro-step, decoded by FFCV.

    Args:
        reader: Reader of the beton's data set.
        order: Order of the samples.
        share: The rank's share of each micro-step.
        dataset: Draws the sample of a position.
        steps: Numbers of the micro-steps.
        collator: Joins samples into a batch.
        threads: Threads of FFCV; at least one is used, and at most one per core.

    Raises:
        ValueError: the data set is remote.
        ShardCorrupt: the file is missing or truncated.
    """
    path = _checked_path(reader)
    epochs = _Epochs(order, share, steps, max(1, EPOCH_SAMPLES // share.micro_batch))
    with _torch_threads_kept():
        loader = Loader(
            path,
            batch_size=share.micro_batch,
            num_workers=max(1, min(threads, max_threads())),
            os_cache=True,
            order=epochs,
            seed=0,  # otherwise FFCV draws a seed from numpy's global generator
            pipelines={"frames": [JpegStackDecoder()], "text": [TextDecoder()]},
            custom_fields={"frames": JpegStackField},
        )
    return _batches(loader, epochs, reader, dataset, collator)


class _Epochs(TraversalOrder):
    """Divides the stream into FFCV epochs of `length` batches each."""

    def __init__(
        self, order: SampleOrder, share: RankShare, steps: MicroSteps, length: int
    ) -> None:
        self._order = order
        self._share = share
        self._steps = iter(steps)
        self._length = length
        self._epoch = -1
        self.samples: list[list[tuple[int, SampleLocation]]] = []
        """Stream positions and samples of each batch of the current epoch."""
        self.rows: list[list[int]] = []
        """Manifest rows of each batch of the current epoch."""

    def __call__(self, loader: Loader) -> _Epochs:
        return self  # FFCV calls its `order` argument to create the order

    def sample_order(self, epoch: int) -> Any:
        if epoch != self._epoch:  # FFCV requests the first epoch twice
            self._epoch = epoch
            self.samples = [
                self._share.samples(self._order, step) for step in islice(self._steps, self._length)
            ]
            self.rows = [[location.sample for _, location in batch] for batch in self.samples]
        return np.array(self.rows, dtype=np.uint64).ravel()


def _batches(
    loader: Loader,
    epochs: _Epochs,
    reader: SampleReader,
    dataset: TrainingDataset,
    collator: BatchCollator,
) -> Iterator[Batch]:
    while True:
        for index, result in enumerate(_decoded(loader)):
            (frames, _, _), _ = result
            intact = _intact(loader, reader, epochs.rows[index], result)
            drawn = [
                dataset.draw(position, location, predecoded=intact)
                for position, location in epochs.samples[index]
            ]
            batch = collator(DrawnBatch(drawn, _slot(reader, frames)))
            assert isinstance(batch, Batch), "a collator without slots returns batches"
            yield batch


def _slot(reader: SampleReader, frames: np.ndarray) -> BatchSlot | None:
    """The memory of a decoded batch, if all samples are stored in the requested size."""
    shape = (reader.num_frames, reader.image_size, reader.image_size, 3)
    is_whole = frames.shape[1] == math.prod(shape)
    return BatchSlot(torch.from_numpy(frames).view(-1, *shape)) if is_whole else None


def _intact(
    loader: Loader, reader: SampleReader, rows: list[int], result: Any
) -> dict[int, StoredFrames]:
    """The samples by manifest row that FFCV decoded from undamaged bytes."""
    (frames, crc32, decoded), texts = result
    stacks, sizes = (loader.reader.metadata[name] for name in ("f0", "f1"))  # by field order
    samples = {}
    for index, row in enumerate(rows):
        text = texts[index, : sizes["size"][row]].tobytes()
        if decoded[index] and zlib.crc32(text, crc32[index]) == reader.manifest.samples.crc32[row]:
            shape = (*(int(stacks[name][row]) for name in ("frames", "height", "width")), 3)
            stored = frames[index, : math.prod(shape)].reshape(shape)
            samples[row] = StoredFrames(json=text, frames=stored)
    return samples


def _decoded(loader: Loader) -> Iterator[Any]:
    """Yields FFCV's results for the batches of its next epoch."""
    with _torch_threads_kept():
        epoch = iter(loader)
        result = _next(epoch)
    try:
        while result is not None:
            yield result
            result = _next(epoch)
    finally:
        epoch.close()  # otherwise its thread waits forever for a consumer


def _next(epoch: EpochIterator) -> Any:
    """Returns the next result or None; FFCV's own `next` never returns if its thread has died."""
    while True:
        is_running = epoch.is_alive()
        try:
            received = epoch.output_queue.get(timeout=POLL_S)
        except Empty:
            if not is_running:
                raise RuntimeError("FFCV's thread failed; its traceback is on stderr") from None
        else:
            return None if received is None else received[1]


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """Restores torch's number of threads, which FFCV changes when a loader or an epoch starts."""
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
        # Reading mapped memory beyond the end of a truncated file would kill the process.
        raise ShardCorrupt(
            f"{path}: the file has {num_bytes} of {beton.shard_bytes} bytes; write the beton again"
        )
    return path
