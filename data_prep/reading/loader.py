"""Batches of a packed data set, for training and for evaluation.

A stream position names one sample (see `order`), so a global batch is a range of positions, and the
state of a stream is one integer: the step. torch's DataLoader reads in parallel and returns batches
in the order of its sampler, whichever worker finishes first.

Workers are forked. They share the manifest's columns with the parent instead of copying them,
they can read memory:// data sets, and they start in milliseconds. Forking is safe although the
parent has threads (gloo, the autograd engine): a worker runs only numpy, Pillow, single-threaded
libav and the tokeniser; torch limits itself to one thread in workers; no worker uses CUDA or a
process group; and the store opens new connections after a fork.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from tvr.data_prep.budget import BadSampleBudget, set_budgets, within_budget
from tvr.data_prep.dataset.manifest import check_words
from tvr.data_prep.reading.augment import NO_AUGMENTATION, Augmentation
from tvr.data_prep.reading.batch_buffers import BatchSlots, PinPages
from tvr.data_prep.reading.collate import Tokenize
from tvr.data_prep.reading.locality import (
    PREFETCH_FACTOR,
    CacheNeed,
    RankShare,
    evaluation_need,
)
from tvr.data_prep.reading.mixed_sets import (
    NO_REGROUP,
    SetReader,
    TrainingReader,
    open_sets,
    set_reader,
)
from tvr.data_prep.reading.node_cache import CacheFolder
from tvr.data_prep.reading.order import Regroup, SampleOrder
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.reading.worker import (
    BatchCollator,
    DrawnBatch,
    EvaluationDataset,
    MicroSteps,
    RowBatches,
    TrainingDataset,
    without_empty,
)
from tvr.data_prep.reading.worker_process import start_worker
from tvr.data_prep.records import Batch, Sample, TrainingSet
from tvr.data_prep.stored.tower_outputs import TowerOutputs
from tvr.data_prep.video.decoders import Decoder
from tvr.data_prep.video.frame_sampling import FrameSpacing

log = logging.getLogger(__name__)


def train_batches(
    source: str | Sequence[TrainingSet],
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
    max_bad: int = 0,
    max_bad_in_a_row: int | None = None,
    max_unavailable_in_a_row: int | None = None,
    known_bad: Mapping[str, str] | None = None,
    augmentation: Augmentation = NO_AUGMENTATION,
    decoder: Decoder = "pyav",
    frame_spacing: FrameSpacing = "time",
    word_drop: bool = False,
    cache_bytes: int = 0,
    shard_cache: CacheFolder | None = None,
    node: range | None = None,
    pin: PinPages | None = None,
    outputs: Mapping[str, TowerOutputs] | None = None,
    regroup: Mapping[str, Regroup] = NO_REGROUP,
) -> Iterator[Batch]:
    """Endless training batches of one rank, `micro_batch` pairs each, one caption per video.

    With G = global_batch, W = world_size and b = micro_batch: step k consumes the stream positions
    [k G, (k + 1) G); its micro-step m consumes W b of them, from k G + m W b. Rank r takes b of
    these by the place of their samples, see `locality`; its batch is in the order of positions. An
    epoch may end inside a batch.

    A bad sample is replaced by `SampleOrder.substitute` and reported in `Batch.replaced`.

    Several training sets are mixed as `mixture` states. Their layouts may differ. Each has its own
    epochs and limits for bad samples, and the keys in its batches carry its name.

    Args:
        source: Folder or fsspec URL of the data set, or several named sets.
        seed: Seed of the order and of all random choices.
        global_batch: Pairs per step on all ranks together.
        micro_batch: Pairs per batch.
        rank: This rank.
        world_size: Number of ranks.
        start_step: First step, from 0.
        workers: Loader processes; 0 = load in this process. For a beton: threads of FFCV.
        num_frames: Frames per sample.
        image_size: Height and width of the frames in pixels.
        tokenize: Tokeniser.
        max_bad: Limit for distinct bad samples on this rank, those of `known_bad` included. Each of
            several sets has its own, and this one is unused.
        max_bad_in_a_row: Limit for consecutive bad samples; None = no limit. Only a sample read as
            planned resets the count.
        max_unavailable_in_a_row: Limit for consecutive reads that fail for the moment, likewise.
        known_bad: Reason by key of bad samples that this run found before a restart.
        augmentation: Random frames and crops.
        decoder: Video decoder, for the video layout.
        frame_spacing: Whether frames are taken evenly in time, see `SampleReader`.
        word_drop: Drop uninformative words from captions, see `drop_words`; the data set must be
            packed with words.
        cache_bytes: Bytes of decoded frames to cache per worker, see `SampleReader`; several sets
            share them by their weights.
        shard_cache: Folder of this node for shards of a remote data set.
        node: The ranks of this node, which share the folder; None = all ranks.
        pin: Pins the memory into which workers decode, for copies to a GPU; see `BatchSlots`.
        outputs: Stored tower outputs of each set by its name; nothing is decoded or tokenised.
        regroup: Last step of each set's order by its name, "" for one without; see `SampleOrder`.

    Returns:
        An iterator that raises `TooManyBadSamples` when a limit is exceeded.

    Raises:
        FileNotFoundError, ShardCorrupt: see `read_manifest`.
        ImportError: the data set is a beton and FFCV is not installed.
        ValueError: sizes that do not fit together, or that the data set cannot provide.
    """
    share = _share(rank, world_size, micro_batch, node, workers)
    steps = MicroSteps(start_step * share.micro_steps(global_batch))
    if start_step < 0:
        raise ValueError(f"start_step={start_step} must be 0 or more")
    sets = [TrainingSet(url=source, max_bad=max_bad)] if isinstance(source, str) else source
    opened = open_sets(
        sets,
        seed=seed,
        global_batch=global_batch,
        num_frames=num_frames,
        image_size=image_size,
        decoder=decoder,
        frame_spacing=frame_spacing,
        cache_bytes=cache_bytes,
        shard_cache=shard_cache,
        outputs=outputs,
        regroup=regroup,
    )
    for each in opened.readers:
        _check_augmentation(augmentation, each, cache_bytes)
        if word_drop:
            check_words(each.url, each.manifest, needed_by="data.word_drop")
    cached = [each for each in opened.readers if isinstance(each, SampleReader)]
    _reserve_cache(cached, opened.cache_need(share, workers), share)
    budgets = set_budgets(
        sets,
        f"on rank {rank}",
        max_bad_in_a_row,
        max_unavailable_in_a_row=max_unavailable_in_a_row,
        known=known_bad,
    )
    reader, order = opened.reader, opened.order
    if isinstance(reader, SampleReader) and reader.manifest.beton is not None:
        assert isinstance(order, SampleOrder), "a beton is the only training set"
        # FFCV is an optional package: import it only for a beton.
        from tvr.data_prep.ffcv.optional_import import import_ffcv

        import_ffcv(f"training from {reader.url}")
        from tvr.data_prep.ffcv.loader import beton_batches

        dataset = TrainingDataset(reader, order, share, augmentation, word_drop=word_drop)
        collator = BatchCollator(reader, tokenize)
        batches = beton_batches(reader, order, share, dataset, steps, collator, workers)
    else:
        slots = _batch_slots(reader, micro_batch, workers, pin)
        dataset = TrainingDataset(
            reader, order, share, augmentation, word_drop=word_drop, slots=slots
        )
        stored = None if outputs is None else next(iter(outputs.values()))
        collator = BatchCollator(reader, tokenize, slots, stored)
        loader = _loader(dataset, steps, collator, workers)
        batches = _received_batches(loader, slots)
    return within_budget(batches, budgets, micro_batch)


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
    max_unavailable_in_a_row: int | None = None,
    decoder: Decoder = "pyav",
    frame_spacing: FrameSpacing = "time",
    shard_cache: CacheFolder | None = None,
    node: range | None = None,
    outputs: TowerOutputs | None = None,
    keep_empty: bool = False,
) -> Iterator[Batch]:
    """This rank's share of a data set in manifest order, each sample once with all its captions.

    Rank r reads the rows [N r // W, N (r + 1) // W), so the shares of two ranks may differ by one
    sample, and so may their numbers of batches. The last batch may be short. A bad sample is left
    out and reported in the `replaced` of its batch, or of a neighbouring batch if its own is empty.

    Args: see `train_batches`; `outputs` are those of this set. With `keep_empty`, batches of 0 rows
    come, too, with the bad samples that they report.

    Returns:
        An iterator that raises `TooManyBadSamples` when a limit is exceeded, or, without
        `keep_empty`, when all samples of this rank are bad.

    Raises:
        FileNotFoundError, ShardCorrupt, ValueError: as `train_batches`.
    """
    share = _share(rank, world_size, micro_batch, node, workers)
    alone = TrainingSet(url=url, max_bad=max_bad)
    reading = {"num_frames": num_frames, "image_size": image_size, "decoder": decoder}
    reading |= {"frame_spacing": frame_spacing, "shard_cache": shard_cache}
    reader = set_reader(alone, None if outputs is None else {"": outputs}, 0, reading)
    first, end = (len(reader) * r // world_size for r in (rank, rank + 1))
    if isinstance(reader, SampleReader) and reader.caches_shards:
        _reserve_cache([reader], evaluation_need(reader.manifest.shards, share, workers), share)
    rows = RowBatches(first, end, micro_batch)
    dataset = EvaluationDataset(reader, end, share.node, world_size)
    collator = BatchCollator(reader, tokenize, outputs=outputs)
    loader = _loader(dataset, rows, collator, workers)
    budget = BadSampleBudget(
        max_bad,
        f"in {url} on rank {rank}",
        max_bad_in_a_row,
        max_unavailable_in_a_row=max_unavailable_in_a_row,
    )
    batches = within_budget(loader, {"": budget}, 0)
    return batches if keep_empty else without_empty(batches, budget)


def read_sample(url: str, key: str, *, num_frames: int, image_size: int) -> Sample:
    """Reads one sample by key, for inspection.

    Raises:
        ValueError: the key is not in the data set.
        BadSample: the sample cannot be used.
        FileNotFoundError, ShardCorrupt: see `read_manifest`.
    """
    return read_samples(url, [key], num_frames=num_frames, image_size=image_size)[0]


def read_samples(
    url: str, keys: Sequence[str], *, num_frames: int, image_size: int
) -> list[Sample]:
    """Reads several samples by key and the manifest once; raises as `read_sample`."""
    reader = SampleReader(url, num_frames=num_frames, image_size=image_size)
    rows = {reader.key(row): row for row in range(len(reader))}
    unknown = [key for key in keys if key not in rows]
    if unknown:
        raise ValueError(f"key={unknown[0]!r} is not in {url} (it holds {len(rows)} samples)")
    return [reader.read(rows[key]) for key in keys]


def _batch_slots(
    reader: TrainingReader, micro_batch: int, workers: int, pin: PinPages | None
) -> BatchSlots | None:
    if not workers or not reader.decodes_into_buffers:
        return None
    size = reader.image_size
    return BatchSlots(workers, (micro_batch, reader.num_frames, size, size, 3), pin)


def _loader(
    dataset: Dataset[DrawnBatch],
    sampler: MicroSteps | RowBatches,
    collator: BatchCollator,
    workers: int,
) -> DataLoader:
    return DataLoader(
        dataset,
        # torch passes whatever an iterable yields to `__getitems__`, contrary to its annotation.
        batch_sampler=sampler,  # type: ignore[arg-type]
        # Its argument is the result of `__getitems__`, not a list of items as torch annotates.
        collate_fn=collator,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=PREFETCH_FACTOR if workers else None,
        # Without a generator, the loader would draw its workers' seeds from the global one.
        generator=torch.Generator().manual_seed(0),
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=start_worker if workers else None,
    )


def _received_batches(loader: DataLoader, slots: BatchSlots | None) -> Iterator[Batch]:
    """Yields the loader's batches; takes frames that workers left in a slot from there."""
    for sent in loader:
        yield sent if slots is None else slots.receive(sent)


def _check_augmentation(augmentation: Augmentation, reader: SetReader, cache_bytes: int) -> None:
    draws_frames = augmentation.frame_sampling == "random"
    if cache_bytes and draws_frames and reader.manifest.layout == "video":
        raise ValueError(
            f"cache_bytes={cache_bytes} (data.cache_mib) must be 0 for the video layout of"
            f" {reader.url} because frame_sampling=random (data.frame_sampling) decodes different"
            " frames each time"
        )


def _share(
    rank: int, world_size: int, micro_batch: int, node: range | None, workers: int
) -> RankShare:
    if workers < 0:
        raise ValueError(f"workers={workers} must be 0 (load in this process) or more")
    return RankShare(
        rank=rank,
        world_size=world_size,
        micro_batch=micro_batch,
        node=range(world_size) if node is None else node,
    )


def _reserve_cache(readers: Sequence[SampleReader], need: CacheNeed, share: RankShare) -> None:
    """Checks the shard cache's size for all data sets of a stream together."""
    ahead = [reader.reserve_cache(need) for reader in readers if reader.caches_shards]
    if not all(ahead) and share.rank == share.node.start:
        log.warning(
            "%s: shards are not downloaded ahead, because the shard cache (data.shard_cache_gib)"
            " has no room for them: these data sets alone need %d bytes, and %d without",
            " and ".join(reader.url for reader in readers),
            need.full,
            need.least,
        )
