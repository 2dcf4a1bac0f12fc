"""What a loader's worker does: stream positions -> samples with captions -> a Batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch.utils.data import Dataset

from tvr.data_prep.reading.augment import Augmentation
from tvr.data_prep.reading.batch_buffers import BatchInSlot
from tvr.data_prep.reading.collate import Tokenize, collate
from tvr.data_prep.reading.order import SampleOrder, caption_choice
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.reading.word_drop import drop_words
from tvr.data_prep.records import BadSample, Batch, Caption, Replacement, Sample

# A row that is still bad after this many substitutes means the data set is bad, not the row.
MAX_ATTEMPTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnSample:
    """What one position gave: a sample with the captions to use, unless all tries were bad."""

    position: int
    sample: Sample | None
    captions: tuple[Caption, ...]
    replaced: tuple[Replacement, ...]


class TrainingDataset(Dataset[DrawnSample]):
    """Stream position -> sample, as this position's view shows it, and one caption, less some of
    its words with `word_drop`."""

    def __init__(
        self,
        reader: SampleReader,
        order: SampleOrder,
        augmentation: Augmentation,
        *,
        word_drop: bool,
    ) -> None:
        self._reader = reader
        self._order = order
        self._augmentation = augmentation
        self._word_drop = word_drop

    def __getitems__(self, positions: Sequence[int]) -> list[DrawnSample]:
        """The samples of a batch; torch's loader asks for them at once."""
        self._reader.make_room(len(positions))
        return [self[position] for position in positions]

    def __getitem__(self, position: int) -> DrawnSample:
        place = self._order.locate(position)
        if self._reader.fetches_ahead:
            self._reader.prefetch(self._order.next_window_shards(place))
        view = self._augmentation.draw(self._order.seed, position, self._reader.num_frames)
        replaced: list[Replacement] = []
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                sample = self._reader.read(place.sample, view)
            except BadSample as error:
                replaced.append(_replacement(position, error))
                place = self._order.substitute(position, attempt)
                continue
            choice = caption_choice(
                self._order.seed, place.epoch, place.sample, len(sample.captions)
            )
            caption = sample.captions[choice]
            if self._word_drop:
                caption = drop_words(caption, self._order.seed, position)
            return DrawnSample(
                position=position, sample=sample, captions=(caption,), replaced=tuple(replaced)
            )
        return DrawnSample(position=position, sample=None, captions=(), replaced=tuple(replaced))


class EvaluationDataset(Dataset[DrawnSample]):
    """Manifest row, below `end`, -> sample and all its captions."""

    def __init__(self, reader: SampleReader, end: int) -> None:
        self._reader = reader
        self._end = end

    def __getitem__(self, position: int) -> DrawnSample:
        if self._reader.fetches_ahead:
            self._reader.prefetch(self._reader.next_shards(position, self._end))
        try:
            sample = self._reader.read(position)
        except BadSample as error:
            return DrawnSample(
                position=position,
                sample=None,
                captions=(),
                replaced=(_replacement(position, error),),
            )
        return DrawnSample(position=position, sample=sample, captions=sample.captions, replaced=())


class PositionBatches:
    """Batch sampler: runs of `length` positions starting at first, first + stride, ... below `end`
    (None: no end)."""

    def __init__(self, first: int, stride: int, length: int, end: int | None) -> None:
        self.length = length
        self._first = first
        self._stride = stride
        self._end = end

    def __iter__(self) -> Iterator[list[int]]:
        start = self._first
        while self._end is None or start < self._end:
            stop = start + self.length
            yield list(range(start, stop if self._end is None else min(stop, self._end)))
            start += self._stride


class BatchCollator:
    """The loader's collate function; with rooms, what it gives is for `BatchSlots.receive`."""

    def __init__(self, reader: SampleReader, tokenize: Tokenize) -> None:
        self._tokenize = tokenize
        self._reader = reader

    def __call__(self, drawn: list[DrawnSample]) -> Batch | BatchInSlot:
        good = [(each.sample, each) for each in drawn if each.sample is not None]
        reader = self._reader
        batch = collate(
            [sample for sample, _ in good],
            [each.captions for _, each in good],
            [each.position for _, each in good],
            self._tokenize,
            reader.num_frames,
            reader.image_size,
            replaced=[entry for each in drawn for entry in each.replaced],
            room=None if reader.room is None else reader.room.frames,
        )
        batch = replace(batch, reads=reader.take_reads())
        return batch if reader.rooms is None else reader.rooms.send(batch, reader.room)


def _replacement(position: int, error: BadSample) -> Replacement:
    return Replacement(position=position, key=error.key, reason=error.reason, detail=error.detail)
