"""Streams of batches over a packed data set, by stream position.

A position names one sample (order.py), so a batch is a run of positions and the whole state of a
stream is the step. torch's DataLoader does the parallel part: it returns batches in the order asked
for, whatever its workers do.

Workers are forked. They then share the manifest's columns with the parent instead of holding a copy
each, see memory:// data sets, and start in milliseconds. Fork is safe here although the parent has
threads (gloo, the autograd engine): a worker runs only numpy, Pillow, libav with one thread, and
the tokeniser; torch limits itself to one thread in workers; nothing touches CUDA or a process
group; and connections are opened anew (reader.py).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch.utils.data import DataLoader, Dataset

from tvr.data_prep.budget import BadSampleBudget
from tvr.data_prep.dataset.manifest import check_words
from tvr.data_prep.ffcv.optional_import import import_ffcv
from tvr.data_prep.reading.augment import NO_AUGMENTATION, Augmentation
from tvr.data_prep.reading.batch_buffers import BatchSlots
from tvr.data_prep.reading.collate import Tokenize
from tvr.data_prep.reading.node_cache import CacheFolder
from tvr.data_prep.reading.order import SampleOrder
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.reading.worker import (
    BatchCollator,
    DrawnSample,
    EvaluationDataset,
    PositionBatches,
    TrainingDataset,
)
from tvr.data_prep.records import Batch, Replacement, Sample
from tvr.data_prep.video.decoders import Decoder


def train_batches(
    url: str,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    start_step: int,
    workers: int,
    num_frames: int,
    image_size: int,
    tokenize: Tokenize,
    max_bad: int,
    max_bad_in_a_row: int | None = None,
    known_bad: Mapping[str, str] | None = None,
    augmentation: Augmentation = NO_AUGMENTATION,
    decoder: Decoder = "pyav",
    word_drop: bool = False,
    cache_bytes: int = 0,
    shard_cache: CacheFolder | None = None,
) -> Iterator[Batch]:
    """Endless batches of `micro_batch` pairs for one rank, one caption a video, from the start of a
    step.

    Step k consumes stream positions [k G, (k + 1) G), its micro-step m the run [k G + m W b, ...)
    of W b, and rank r the r-th run of b therein, for G = global_batch, W = world_size, b =
    micro_batch. An epoch ends inside a batch. A bad sample is replaced by `SampleOrder.substitute`
    and reported in Batch.replaced; `max_bad` limits the different bad samples this rank meets,
    those of `known_bad` (keys with reasons) included, and `max_bad_in_a_row` those with no sample
    between them that was read as planned.
    `views` says what is drawn anew each time. `word_drop` leaves out fillers of captions, see
    `drop_words`; the data set must be packed with words. `decoder` and `cache_bytes` (per worker)
    as in SampleReader; `shard_cache` likewise, per node.

    Raises, at the call:
        FileNotFoundError, ShardCorrupt: see read_manifest.
        ValueError: sizes that do not fit together or that the data set cannot give.
    Raises, from the iterator:
        TooManyBadSamples: the budget is spent.
    """
    run = micro_batch * world_size
    _check_rank(rank, world_size, micro_batch, workers)
    if global_batch < run or global_batch % run:
        nearest = max(1, round(global_batch / run)) * run
        raise ValueError(
            f"global_batch={global_batch} must be a multiple of micro_batch x world_size ="
            f" {micro_batch} x {world_size}; the nearest is {nearest}"
        )
    if start_step < 0:
        raise ValueError(f"start_step={start_step} must be 0 or more")
    reader = SampleReader(
        url,
        num_frames=num_frames,
        image_size=image_size,
        decoder=decoder,
        cache_bytes=cache_bytes,
        shard_cache=shard_cache,
    )
    _check_augmentation(augmentation, reader, cache_bytes)
    if word_drop:
        check_words(url, reader.manifest, needed_by="data.word_drop")
    order = SampleOrder(reader.manifest.shard_sizes, seed)
    rows = TrainingDataset(reader, order, augmentation, word_drop=word_drop)
    join = BatchCollator(reader, tokenize)
    runs = PositionBatches(start_step * global_batch + rank * micro_batch, run, micro_batch, None)
    if reader.manifest.beton is None:
        batches = _received(reader, rows, runs, join, workers)
    else:
        import_ffcv(f"training from {url}")
        from tvr.data_prep.ffcv.loader import beton_batches

        batches = beton_batches(reader, order, rows, runs, join, workers)
    budget = BadSampleBudget(max_bad, f"in {url} on rank {rank}", max_bad_in_a_row, known=known_bad)
    return _within_budget(batches, budget, micro_batch)


def evaluation_batches(
    url: str,
    *,
    micro_batch: int,
    rank: int,
    world_size: int,
    workers: int,
    num_frames: int,
    image_size: int,
    tokenize: Tokenize,
    max_bad: int,
    max_bad_in_a_row: int | None = None,
    decoder: Decoder = "pyav",
    shard_cache: CacheFolder | None = None,
) -> Iterator[Batch]:
    """Every sample once over all ranks in manifest order, with all its captions; the last batch may
    be short.

    Rank r takes samples [N r // W, N (r + 1) // W), so ranks may differ by one sample, and so in
    their number of batches. A bad sample is left out, reported in the `replaced` of its batch (or
    of a neighbour, where no row is left) and limited per rank by `max_bad` and `max_bad_in_a_row`;
    a rank whose samples are all bad raises TooManyBadSamples. Raises as `train_batches`.
    """
    _check_rank(rank, world_size, micro_batch, workers)
    reader = SampleReader(
        url,
        num_frames=num_frames,
        image_size=image_size,
        decoder=decoder,
        shard_cache=shard_cache,
    )
    first, end = (len(reader) * r // world_size for r in (rank, rank + 1))
    runs = PositionBatches(first, micro_batch, micro_batch, end)
    loader = _loader(EvaluationDataset(reader, end), runs, BatchCollator(reader, tokenize), workers)
    budget = BadSampleBudget(max_bad, f"in {url} on rank {rank}", max_bad_in_a_row)
    return _without_empty(_within_budget(loader, budget, 0), budget)


def read_sample(url: str, key: str, *, num_frames: int, image_size: int) -> Sample:
    """One sample by key, for looking at. Raises ValueError for an unknown key, BadSample, and as
    read_manifest."""
    return read_samples(url, [key], num_frames=num_frames, image_size=image_size)[0]


def read_samples(
    url: str, keys: Sequence[str], *, num_frames: int, image_size: int
) -> list[Sample]:
    """As `read_sample` for several keys, reading the manifest once."""
    reader = SampleReader(url, num_frames=num_frames, image_size=image_size)
    rows = {reader.key(row): row for row in range(len(reader))}
    unknown = [key for key in keys if key not in rows]
    if unknown:
        raise ValueError(f"key={unknown[0]!r} is not in {url} (it holds {len(rows)} samples)")
    return [reader.read(rows[key]) for key in keys]


def _received(
    reader: SampleReader,
    rows: Dataset[DrawnSample],
    runs: PositionBatches,
    join: BatchCollator,
    workers: int,
) -> Iterator[Batch]:
    """The loader's batches, whose frames lie in memory that is used again where they can."""
    if not workers or not reader.decodes_into_place:
        yield from _loader(rows, runs, join, workers)
        return
    size = reader.image_size
    rooms = reader.rooms = BatchSlots(workers, (runs.length, reader.num_frames, size, size, 3))
    for sent in _loader(rows, runs, join, workers):
        yield rooms.receive(sent)


def _loader(
    rows: Dataset[DrawnSample], runs: PositionBatches, join: BatchCollator, workers: int
) -> DataLoader:
    return DataLoader(
        rows,
        # An iterable of index lists is all that torch needs, whatever its annotation says.
        batch_sampler=runs,  # type: ignore[arg-type]
        collate_fn=join,
        num_workers=workers,
        # Without one of its own the loader would draw its workers' seeds from the global generator.
        generator=torch.Generator().manual_seed(0),
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_exit_on_sigterm_of_parent if workers else None,
    )


def _exit_on_sigterm_of_parent(worker: int) -> None:
    """A loader process leaves by SIGTERM of its rank alone: batch systems send it to all processes
    of a job, whose ranks finish a step and save. Without this torch's handler ends the process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    rank = os.getppid()

    def leave() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
            pass
        os._exit(0)

    threading.Thread(target=leave, name="leave", daemon=True).start()


def _within_budget(
    batches: Iterable[Batch], budget: BadSampleBudget, min_rows: int
) -> Iterator[Batch]:
    for batch in batches:
        _spend(budget, batch)
        if len(batch.keys) < min_rows:
            raise budget.exhausted_error()
        yield batch


def _spend(budget: BadSampleBudget, batch: Batch) -> None:
    """Counts in the order of positions. A substitute ends no row of failures: it comes from
    anywhere in the data set, and says nothing about the place that is being read."""
    bad: dict[int, list[Replacement]] = {}
    for entry in batch.replaced:
        bad.setdefault(entry.position, []).append(entry)
    for position in sorted({*batch.positions.tolist(), *bad}):
        for entry in bad.get(position, ()):
            budget.record_bad(entry.key, entry.reason, entry.detail)
        if position not in bad:
            budget.record_good()


def _without_empty(batches: Iterator[Batch], budget: BadSampleBudget) -> Iterator[Batch]:
    """Drops batches of 0 rows; what they report goes to the batch before or, at the start, after
    them."""
    held: Batch | None = None
    orphans: tuple[Replacement, ...] = ()
    for batch in batches:
        if not batch.keys and held is not None:
            held = replace(held, replaced=held.replaced + batch.replaced)
        elif not batch.keys:
            orphans += batch.replaced
        else:
            if held is not None:
                yield held
            held, orphans = replace(batch, replaced=orphans + batch.replaced), ()
    if held is not None:
        yield held
    elif orphans:
        raise budget.exhausted_error()  # not one good sample, and no batch to report it in


def _check_augmentation(augmentation: Augmentation, reader: SampleReader, cache_bytes: int) -> None:
    if (
        cache_bytes
        and augmentation.frame_sampling == "random"
        and reader.manifest.layout == "video"
    ):
        raise ValueError(
            f"cache_bytes={cache_bytes} (data.cache_mib) must be 0 for the video layout of"
            f" {reader.url} where frame_sampling=random (data.frame_sampling) decodes other frames"
            " each time"
        )


def _check_rank(rank: int, world_size: int, micro_batch: int, workers: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must be from 0 to world_size - 1 = {world_size - 1}")
    if micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch} must be at least 1")
    if workers < 0:
        raise ValueError(f"workers={workers} must be 0 (load in this process) or more")
