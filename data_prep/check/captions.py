"""What can be said of a data set's captions without keeping them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tvr.data_prep.check.distribution import Distribution, distribution
from tvr.data_prep.records import hash_video_id

LONG_WORDS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionStatistics:
    """Captions are equal where every character is."""

    num_captions: int
    num_empty: int
    """Without a visible character."""
    num_long: int
    """Of more than LONG_WORDS words."""
    num_repeated: int
    """Equal to an earlier caption of the same video."""
    num_distinct: int
    num_shared: int
    """Distinct captions that several videos have."""
    words: Distribution | None
    """Words in a caption, parted by white space; None without captions."""


class CaptionAccumulator:
    """Counts captions one video or tally at a time, in 20 bytes a caption."""

    def __init__(self) -> None:
        self._num_words = array("I")
        self._captions = array("Q")
        self._videos = array("Q")

    def add(self, video_id: str, captions: Sequence[str]) -> None:
        """Counts captions of a video; it may come again with more."""
        self._num_words.extend(len(caption.split()) for caption in captions)
        self._captions.extend(_hash(caption) for caption in captions)
        self._videos.extend([hash_video_id(video_id)] * len(captions))

    def merge(self, other: CaptionAccumulator) -> None:
        """Counts what another tally did."""
        self._num_words.extend(other._num_words)
        self._captions.extend(other._captions)
        self._videos.extend(other._videos)

    def statistics(self) -> CaptionStatistics:
        """Of all that was counted."""
        num_words = np.array(self._num_words, dtype=np.int64)
        captions, videos = np.array(self._captions), np.array(self._videos)
        order = np.lexsort((videos, captions))
        is_new_caption = _differs_from_last(captions[order])
        is_new_pair = is_new_caption | _differs_from_last(videos[order])
        videos_each = np.bincount(np.cumsum(is_new_caption)[is_new_pair] - 1)
        return CaptionStatistics(
            num_captions=len(num_words),
            num_empty=int((num_words == 0).sum()),
            num_long=int((num_words > LONG_WORDS).sum()),
            num_repeated=len(num_words) - int(is_new_pair.sum()),
            num_distinct=len(videos_each),
            num_shared=int((videos_each > 1).sum()),
            words=distribution(num_words, whole=True),
        )

    def num_also_in(self, other: CaptionAccumulator) -> int:
        """Distinct captions that the other tally counted, too."""
        return len(np.intersect1d(np.array(self._captions), np.array(other._captions)))


def _differs_from_last(values: np.ndarray) -> np.ndarray:
    """Whether each value is another than the one before it; the first is."""
    differs = np.ones(len(values), dtype=bool)
    differs[1:] = values[1:] != values[:-1]
    return differs


def _hash(caption: str) -> int:
    # At 64 bits ten million different captions have an equal pair once in 370,000 data sets.
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little")
