"""Caption statistics of a data set, computed in one pass in 20 bytes per caption."""

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
    """Statistics of captions; two captions are equal if all their characters are."""

    num_captions: int
    num_empty: int
    """Captions without a visible character."""
    num_long: int
    """Captions of more than LONG_WORDS words."""
    num_repeated: int
    """Captions equal to an earlier caption of the same video."""
    num_distinct: int
    num_shared: int
    """Distinct captions that several videos have."""
    words: Distribution | None
    """Words per caption, separated by white space; None without captions."""


class CaptionAccumulator:
    """Collects hashes and lengths of captions; accumulators of several threads can be merged."""

    def __init__(self) -> None:
        self._num_words = array("I")
        self._captions = array("Q")
        self._videos = array("Q")

    def add(self, video_id: str, captions: Sequence[str]) -> None:
        """Adds captions of a video; may be called several times for the same video."""
        self._num_words.extend(len(caption.split()) for caption in captions)
        self._captions.extend(_hash(caption) for caption in captions)
        self._videos.extend([hash_video_id(video_id)] * len(captions))

    def merge(self, other: CaptionAccumulator) -> None:
        """Adds the captions of another accumulator."""
        self._num_words.extend(other._num_words)
        self._captions.extend(other._captions)
        self._videos.extend(other._videos)

    def statistics(self) -> CaptionStatistics:
        """Computes the statistics of all captions added so far."""
        num_words = np.array(self._num_words, dtype=np.int64)
        captions, videos = np.array(self._captions), np.array(self._videos)
        order = np.lexsort((videos, captions))
        is_new_caption = _differs_from_previous(captions[order])
        is_new_pair = is_new_caption | _differs_from_previous(videos[order])
        videos_per_caption = np.bincount(np.cumsum(is_new_caption)[is_new_pair] - 1)
        return CaptionStatistics(
            num_captions=len(num_words),
            num_empty=int((num_words == 0).sum()),
            num_long=int((num_words > LONG_WORDS).sum()),
            num_repeated=len(num_words) - int(is_new_pair.sum()),
            num_distinct=len(videos_per_caption),
            num_shared=int((videos_per_caption > 1).sum()),
            words=distribution(num_words, whole=True),
        )

    def num_also_in(self, other: CaptionAccumulator) -> int:
        """Number of distinct captions that the other accumulator contains as well."""
        return len(np.intersect1d(np.array(self._captions), np.array(other._captions)))


def _differs_from_previous(values: np.ndarray) -> np.ndarray:
    """True for each value that differs from the one before it, and for the first."""
    differs = np.ones(len(values), dtype=bool)
    differs[1:] = values[1:] != values[:-1]
    return differs


def _hash(caption: str) -> int:
    # With 64 bits, one in 370,000 data sets of ten million distinct captions has a collision.
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little")
