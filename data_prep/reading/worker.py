"""The work of a loader worker: a micro-step's number -> samples with captions -> a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from torch.utils.data import Dataset

from tvr.data_prep.budget import BadSampleBudget
from tvr.data_prep.reading.augment import Augmentation, drop_words
from tvr.data_prep.reading.batch_buffers import BatchInSlot, BatchSlot, BatchSlots, private_slot
from tvr.data_prep.reading.collate import Tokenize, collate
from tvr.data_prep.reading.locality import PREFETCHED_SHARDS, RankShare, owned
from tvr.data_prep.reading.mixed_sets import SetReader, TrainingOrder, TrainingReader
from tvr.data_prep.reading.order import SampleLocation, caption_choice
from tvr.data_prep.reading.sample_reader import NOT_PREDECODED, StoredFrames
from tvr.data_prep.records import (
    TRANSIENT_REASONS,
    BadSample,
    Batch,
    Caption,
    Replacement,
    Sample,
)
from tvr.data_prep.stored.tower_outputs import TowerOutputs, collate_stored

# If this many samples in a row are bad, the data set is bad, and the position stays empty.
MAX_ATTEMPTS = 16
# If so many reads of a position fail for the moment, the storage is down. Each of them has been
# retried for minutes, and the run should end with that message before it counts as stalled.
MAX_UNAVAILABLE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnSample:
    """The sample read for one stream position, with the captions to use."""

    position: int
    sample: Sample | None
    """None if the sample, and in training all its substitutes, are bad."""
    captions: tuple[Caption, ...]
    replaced: tuple[Replacement, ...]
    """Bad samples found at this position."""


@dataclass(frozen=True, slots=True)
class DrawnBatch:
    """The samples of one batch before collation."""

    samples: Sequence[DrawnSample]
    slot: BatchSlot | None = None
    """Memory that the frames may have been decoded into."""


class TrainingDataset(Dataset[DrawnBatch]):
    """Maps micro-steps to the augmented samples of one rank, each with one caption.

    Args:
        reader: Source of the samples.
        order: Order of the samples.
        share: The rank's share of each micro-step.
        augmentation: Random frames and crops.
        word_drop: Drop uninformative words from captions.
        slots: Memory to decode batches into; None = allocate memory for each batch.
    """

    def __init__(
        self,
        reader: TrainingReader,
        order: TrainingOrder,
        share: RankShare,
        augmentation: Augmentation,
        *,
        word_drop: bool,
        slots: BatchSlots | None = None,
    ) -> None:
        self._reader = reader
        self._order = order
        self._share = share
        self._augmentation = augmentation
        self._word_drop = word_drop
        self._slots = slots

    def __getitems__(self, micro_step: int) -> DrawnBatch:
        """Draws a whole batch; torch's DataLoader calls this method.

        The worker finds out which samples these are, so that the main process, which trains, does
        not have to.
        """
        if self._reader.caches_shards:
            self._reader.use_shards(*self._share.shards(self._order, micro_step))
        samples = self._share.samples(self._order, micro_step)
        slot = self._slot(len(samples))
        rows = [None] * len(samples) if slot is None else slot.frames.numpy()
        drawn = (
            self.draw(position, location, out=row)
            for (position, location), row in zip(samples, rows, strict=True)
        )
        return DrawnBatch(_until_unavailable(drawn), slot)

    def draw(
        self,
        position: int,
        location: SampleLocation,
        *,
        out: np.ndarray | None = None,
        predecoded: Mapping[int, StoredFrames] = NOT_PREDECODED,
    ) -> DrawnSample:
        """Reads the sample of a stream position, or a substitute if it is bad.

        Args:
            position: Stream position.
            location: The sample there.
            out: Memory to decode into, see `SampleReader.read`.
            predecoded: Samples that need not be read, see `SampleReader.read`.
        """
        view = self._augmentation.draw(self._order.seed, position, self._reader.num_frames)
        replaced: list[Replacement] = []
        num_unavailable = 0
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                sample = self._reader.read(location.sample, view, out=out, predecoded=predecoded)
            except BadSample as error:
                replaced.append(_replacement(position, error))
                num_unavailable += error.reason in TRANSIENT_REASONS
                if num_unavailable >= MAX_UNAVAILABLE:
                    break
                location = self._order.substitute(position, attempt)
                continue
            choice = caption_choice(
                self._order.seed, location.epoch, location.sample, len(sample.captions)
            )
            caption = sample.captions[choice]
            if self._word_drop:
                caption = drop_words(caption, self._order.seed, position)
            return DrawnSample(
                position=position, sample=sample, captions=(caption,), replaced=tuple(replaced)
            )
        return DrawnSample(position=position, sample=None, captions=(), replaced=tuple(replaced))

    def _slot(self, count: int) -> BatchSlot | None:
        reader = self._reader
        if not reader.decodes_into_buffers:
            return None
        if self._slots is not None:
            return self._slots.lend(count)
        return private_slot((count, reader.num_frames, reader.image_size, reader.image_size, 3))


class EvaluationDataset(Dataset[DrawnBatch]):
    """Maps manifest rows below `end` to samples with all their captions.

    Args:
        reader: Source of the samples.
        end: End of this rank's rows.
        node: The ranks of this node.
        world_size: Number of ranks.
    """

    def __init__(self, reader: SetReader, end: int, node: range, world_size: int) -> None:
        self._reader = reader
        self._end = end
        self._shard: int | None = None
        self._starts = np.cumsum([0, *reader.manifest.shard_sizes])
        self._is_owned = owned(self._starts, node, world_size)

    def __getitems__(self, rows: Sequence[int]) -> DrawnBatch:
        """Reads a whole batch; torch's DataLoader calls this method."""
        return DrawnBatch([self.draw(row) for row in rows])

    def draw(self, row: int) -> DrawnSample:
        """Reads the sample of a manifest row; a bad sample is left out."""
        if self._reader.caches_shards:
            self._use_shard(row)
        try:
            sample = self._reader.read(row)
        except BadSample as error:
            replaced = (_replacement(row, error),)
            return DrawnSample(position=row, sample=None, captions=(), replaced=replaced)
        return DrawnSample(position=row, sample=sample, captions=sample.captions, replaced=())

    def _use_shard(self, row: int) -> None:
        here, last = (
            np.searchsorted(self._starts, (row, self._end - 1), side="right") - 1
        ).tolist()
        if here != self._shard:
            self._shard = here
            own = [
                shard
                for shard in range(here, min(here + PREFETCHED_SHARDS, last) + 1)
                if self._is_owned[shard]
            ]
            self._reader.use_shards(
                [shard for shard in own if shard == here], [shard for shard in own if shard != here]
            )


class MicroSteps:
    """Batch sampler for training: the numbers of the micro-steps from `first`, without end."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        return count(self._first)


class RowBatches:
    """Batch sampler for evaluation: the rows from `first` to below `end`, in order.

    Args:
        first: First row.
        end: Rows are below `end`.
        length: Rows per batch; the last batch may be shorter.
    """

    def __init__(self, first: int, end: int, length: int) -> None:
        self._first = first
        self._end = end
        self._length = length

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self._first, self._end, self._length):
            yield list(range(start, min(start + self._length, self._end)))


class BatchCollator:
    """Collate function of the loader; with slots, `BatchSlots.receive` restores its results.

    With `outputs`, stored tower outputs take the place of frames and token ids.
    """

    def __init__(
        self,
        reader: TrainingReader,
        tokenize: Tokenize,
        slots: BatchSlots | None = None,
        outputs: TowerOutputs | None = None,
    ) -> None:
        self._outputs = outputs
        self._reader = reader
        self._tokenize = tokenize
        self._slots = slots

    def __call__(self, drawn: DrawnBatch) -> Batch | BatchInSlot:
        good = [(each.sample, each) for each in drawn.samples if each.sample is not None]
        reader = self._reader
        samples = [sample for sample, _ in good]
        captions = [each.captions for _, each in good]
        positions = [each.position for _, each in good]
        replaced = [entry for each in drawn.samples for entry in each.replaced]
        if self._outputs is not None:
            batch = collate_stored(samples, captions, positions, self._outputs, replaced)
            return replace(batch, reads=reader.pop_read_counts())
        batch = collate(
            samples,
            captions,
            positions,
            self._tokenize,
            reader.num_frames,
            reader.image_size,
            replaced=replaced,
            buffer=None if drawn.slot is None else drawn.slot.frames,
        )
        batch = replace(batch, reads=reader.pop_read_counts())
        return batch if self._slots is None else self._slots.send(batch, drawn.slot)


def _until_unavailable(drawn: Iterable[DrawnSample]) -> list[DrawnSample]:
    """The samples of a batch, up to a position that the storage could not fill.

    The stream ends at such a batch. Reading the rest first would only delay that.
    """
    taken: list[DrawnSample] = []
    for sample in drawn:
        taken.append(sample)
        if sample.sample is None and sample.replaced[-1].reason in TRANSIENT_REASONS:
            break
    return taken


def _replacement(position: int, error: BadSample) -> Replacement:
    return Replacement(position=position, key=error.key, reason=error.reason, detail=error.detail)


def without_empty(batches: Iterator[Batch], budget: BadSampleBudget) -> Iterator[Batch]:
    """Drops batches of 0 rows; a neighbouring batch reports their bad samples."""
    pending: Batch | None = None
    unreported: tuple[Replacement, ...] = ()
    for batch in batches:
        if not batch.keys and pending is not None:
            pending = replace(pending, replaced=pending.replaced + batch.replaced)
        elif not batch.keys:
            unreported += batch.replaced
        else:
            if pending is not None:
                yield pending
            pending, unreported = replace(batch, replaced=unreported + batch.replaced), ()
    if pending is not None:
        yield pending
    elif unreported:
        raise budget.exhausted_error()  # all samples are bad: no batch can report them
