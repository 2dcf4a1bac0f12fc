"""Reads the stored tower outputs of one data set, as the loader asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tvr.data_prep.records import BadSample, ShardCorrupt
from tvr.trainer.features.feature_set import EMBED_AGAIN, DataSource, FeatureSet


class SetOutputs:
    """`TowerOutputs` of one data set of a feature set; works in forked loader workers.

    Args:
        features: The feature set, which may hold other data sets.
        source: The data set.

    Raises:
        ShardCorrupt: the rows of its videos do not ascend.
    """

    def __init__(self, features: FeatureSet, source: DataSource) -> None:
        self.num_frames = features.info.num_frames
        self._features = features
        numbers, rows = features.videos_of(source)
        captions = features.caption_video
        # Arrays, since lists and dicts of ten million videos would take 2 GB in each process.
        self._first_caption = torch.searchsorted(captions, numbers).numpy()
        self._end_caption = torch.searchsorted(captions, numbers, right=True).numpy()
        self._numbers, self._rows = numbers.numpy(), rows.numpy()
        if (np.diff(self._rows) <= 0).any():
            raise ShardCorrupt(f"{features.folder / source.name}: rows must ascend; {EMBED_AGAIN}")
        self._left_out = {
            each.position: each
            for found, part in features.parts
            if found.name == source.name
            for each in part.left_out
        }

    def place(self, row: int) -> tuple[int, range]:
        """Returns the number of the video of a manifest row, and those of its captions.

        Raises:
            BadSample: the video could not be encoded, with the reason found then.
        """
        index = int(np.searchsorted(self._rows, row))
        if index == len(self._rows) or self._rows[index] != row:
            bad = self._left_out.get(row)
            if bad is None:
                raise BadSample(f"row {row}", "unreadable", "it has no stored features")
            raise BadSample(bad.key, bad.reason, bad.detail)
        first, end = int(self._first_caption[index]), int(self._end_caption[index])
        return int(self._numbers[index]), range(first, end)

    def captions(self, numbers: range) -> list[str]:
        """Returns the texts of a video's captions."""
        return self._features.caption_texts(numbers)

    def videos(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Reads B videos: frames (B, F, D) float32, frame_mask (B, F)."""
        rows = np.asarray(numbers, dtype=np.int64)
        frames, mask = (self._features.column(name, rows) for name in ("frames", "frame_mask"))
        return frames.float(), mask

    def texts(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Reads A captions: sentence and words (A, 1 + T, D) float32, word_mask (A, T)."""
        rows = np.asarray(numbers, dtype=np.int64)
        sentence, words, mask = (
            self._features.column(name, rows) for name in ("sentence", "words", "word_mask")
        )
        return torch.cat([sentence[:, None], words], dim=1).float(), mask
