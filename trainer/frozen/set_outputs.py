"""Reads the stored tower outputs of one data set, as the loader asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tvr.data_prep.records import BadSample
from tvr.trainer.features.feature_set import DataSource, FeatureSet


class SetOutputs:
    """`TowerOutputs` of one data set of a feature set; works in forked loader workers.

    Args:
        features: The feature set, which may hold other data sets.
        source: The data set.
    """

    def __init__(self, features: FeatureSet, source: DataSource) -> None:
        self.num_frames = features.info.num_frames
        self._features = features
        numbers, rows = features.videos_of(source)
        self._first_caption = torch.searchsorted(features.caption_video, numbers).tolist()
        self._end_caption = torch.searchsorted(features.caption_video, numbers, right=True).tolist()
        self._numbers = numbers.tolist()
        self._index_of = {row: index for index, row in enumerate(rows.tolist())}
        self._left_out = {
            each.position: each
            for found, part in features.parts
            if found == source
            for each in part.left_out
        }

    def place(self, row: int) -> tuple[int, range]:
        """Returns the number of the video of a manifest row, and those of its captions.

        Raises:
            BadSample: the video could not be encoded, with the reason found then.
        """
        index = self._index_of.get(row)
        if index is None:
            bad = self._left_out.get(row)
            if bad is None:
                raise BadSample(f"row {row}", "unreadable", "it has no stored features")
            raise BadSample(bad.key, bad.reason, bad.detail)
        return self._numbers[index], range(self._first_caption[index], self._end_caption[index])

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
