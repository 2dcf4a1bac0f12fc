"""Stored outputs of frozen towers in place of frames and token ids.

A run whose towers are frozen need not decode and encode a clip at each visit: the outputs of the
towers are the same each time. The order, the caption of a visit and the rules for bad samples are
those of reading videos; only the content of a batch is another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.records import (
    Batch,
    Caption,
    Replacement,
    Sample,
    hash_caption,
    hash_video_id,
)

NOTHING: Mapping[int, object] = {}
NO_FRAMES = np.empty((0, 0), np.float32)


class TowerOutputs(Protocol):
    """Stored outputs for one data set.

    Videos and captions have numbers, which several data sets of one folder share: the vectors of
    any number can be read through the outputs of any of them.
    """

    num_frames: int

    def place(self, row: int) -> tuple[int, range]:
        """Returns the number of the video of a manifest row, and those of its captions.

        Raises:
            BadSample: the video could not be encoded, with the reason.
        """
        ...

    def captions(self, numbers: range) -> list[str]:
        """Returns the texts of a video's captions."""
        ...

    def videos(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Reads B videos: frames (B, F, D) float32, frame_mask (B, F) int64."""
        ...

    def texts(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Reads A captions: sentence and words (A, 1 + T, D) float32, word_mask (A, T) int64."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCaption(Caption):
    """A caption whose vectors are stored."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredSample(Sample):
    """A clip whose vectors are stored; it has no frames."""

    number: int


class StoredReader:
    """Finds the stored vectors of any sample by its manifest row; as `SampleReader` for frames.

    Args:
        url: Folder or fsspec URL of the packed data set, of which only the index is read.
        outputs: Its stored outputs.
        node_folder: Folder for a copy of the index of a remote data set.

    Raises:
        FileNotFoundError, OSError, ShardCorrupt: see `read_manifest`.
    """

    caches_shards = False
    decodes_into_buffers = False
    image_size = 0

    def __init__(self, url: str, outputs: TowerOutputs, node_folder: str | None = None) -> None:
        self.url = url
        self.manifest = read_manifest(url, node_folder=node_folder)
        self.num_frames = outputs.num_frames
        self._outputs = outputs
        self._reads: Counter[str] = Counter()

    def __len__(self) -> int:
        return self.manifest.num_samples

    def key(self, row: int) -> str:
        """Returns the key of a manifest row."""
        return str(self.manifest.samples.key[row])

    def use_shards(self, current: Sequence[int], upcoming: Sequence[int]) -> None:
        """Does nothing: no shard is read."""

    def pop_read_counts(self) -> dict[str, int]:
        """Returns the number of samples read since the last call, by READ_SOURCES."""
        counts = dict(self._reads)
        self._reads.clear()
        return counts

    def read(
        self,
        row: int,
        view: object = None,
        *,
        out: np.ndarray | None = None,
        predecoded: Mapping[int, object] = NOTHING,
    ) -> StoredSample:
        """Finds one sample; its vectors are read with those of its batch. It has one view only.

        Raises:
            BadSample: the video could not be encoded.
        """
        number, captions = self._outputs.place(row)
        texts = self._outputs.captions(captions)
        self._reads["features"] += 1
        return StoredSample(
            key=self.key(row),
            video_id=str(self.manifest.samples.video_id[row]),
            captions=tuple(
                StoredCaption(text=text, number=each)
                for each, text in zip(captions, texts, strict=True)
            ),
            frames=NO_FRAMES,
            frame_times_s=(),
            number=number,
        )


def collate_stored(
    samples: Sequence[Sample],
    captions_per_sample: Sequence[Sequence[Caption]],
    positions: Sequence[int],
    outputs: TowerOutputs,
    replaced: Sequence[Replacement],
) -> Batch:
    """Joins B samples of `StoredReader` into a batch, as `collate` those of `SampleReader`.

    Returns:
        `Batch.frames` (B, F, D) and `Batch.token_ids` (A, 1 + T, D) hold stored vectors.
    """
    captions = [caption for chosen in captions_per_sample for caption in chosen]
    rows = [row for row, chosen in enumerate(captions_per_sample) for _ in chosen]
    frames, frame_mask = outputs.videos(
        [each.number for each in samples if isinstance(each, StoredSample)]
    )
    texts, word_mask = outputs.texts(
        [each.number for each in captions if isinstance(each, StoredCaption)]
    )
    return Batch(
        positions=torch.tensor(positions, dtype=torch.int64),
        keys=tuple(sample.key for sample in samples),
        video_ids=torch.tensor(
            [hash_video_id(sample.video_id) for sample in samples], dtype=torch.int64
        ),
        frames=frames,
        frame_mask=frame_mask,
        captions=tuple(caption.text for caption in captions),
        caption_ids=torch.tensor(
            [hash_caption(caption.whole) for caption in captions], dtype=torch.int64
        ),
        token_ids=texts,
        word_mask=word_mask,
        caption_video=torch.tensor(rows, dtype=torch.int64),
        replaced=tuple(replaced),
    )
