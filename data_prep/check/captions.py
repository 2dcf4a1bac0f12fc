"""Caption statistics of a data set, computed in one pass without keeping a caption.

The pass keeps 20 bytes per caption and 4 bytes per sample: a hash, the hash of the video and a
number of words. Merging the shards doubles this for a moment. Sorting takes the peak to about 70
bytes per caption while few captions are shared.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tvr.data_prep.check.distribution import Distribution, distribution
from tvr.data_prep.records import hash_caption, hash_video_id

LONG_WORDS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionStatistics:
    """Statistics of captions; two captions are equal if their normal forms are, see
    `normal_caption`."""

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
    num_sharing: int
    """Captions that are equal to a caption of another video."""
    equal_probability: float
    """Probability that two samples, each with one of its captions drawn at random, show different
    videos and have equal captions."""
    words: Distribution | None
    """Words per caption, separated by white space; None without captions."""


class FrequentCaption(NamedTuple):
    """A caption that several videos have."""

    caption_hash: int
    num_videos: int
    sample: int
    """The first sample that has it, counted in the order in which samples were added."""


class CaptionAccumulator:
    """Collects hashes and lengths of captions; accumulators of several threads can be merged."""

    def __init__(self) -> None:
        self._num_words = array("I")
        self._captions = array("Q")
        self._videos = array("Q")
        self._of_sample = array("I")
        self._grouped: _Groups | None = None

    def add(self, video_id: str, captions: Sequence[str]) -> None:
        """Adds the captions of a sample; a video may have several samples."""
        self._grouped = None
        self._num_words.extend(len(caption.split()) for caption in captions)
        self._captions.extend(hash_caption(caption) for caption in captions)
        self._videos.extend([hash_video_id(video_id)] * len(captions))
        self._of_sample.append(len(captions))

    def merge(self, other: CaptionAccumulator) -> None:
        """Adds the samples of another accumulator."""
        self._grouped = None
        self._num_words.extend(other._num_words)
        self._captions.extend(other._captions)
        self._videos.extend(other._videos)
        self._of_sample.extend(other._of_sample)

    def statistics(self) -> CaptionStatistics:
        """Computes the statistics of all captions added so far."""
        words = np.asarray(self._num_words)
        groups = self._groups()
        return CaptionStatistics(
            num_captions=len(words),
            num_empty=int((words == 0).sum()),
            num_long=int((words > LONG_WORDS).sum()),
            num_repeated=len(words) - groups.num_pairs,
            num_distinct=groups.num_distinct,
            num_shared=len(groups.starts),
            num_sharing=len(groups.order),
            equal_probability=self._equal_probability(groups),
            words=distribution(words, whole=True),
        )

    def most_frequent(self, count: int) -> list[FrequentCaption]:
        """The captions that most videos have, of those that several videos have."""
        groups, captions = self._groups(), np.asarray(self._captions)
        # Captions of equally many videos are in the order of their hashes.
        chosen = np.argsort(-groups.num_videos, kind="stable")[:count]
        firsts = np.minimum.reduceat(groups.order, groups.starts) if len(chosen) else chosen
        found = []
        samples = self._samples(firsts)
        for group in chosen.tolist():
            found.append(
                FrequentCaption(
                    caption_hash=int(captions[firsts[group]]),
                    num_videos=int(groups.num_videos[group]),
                    sample=int(samples[group]),
                )
            )
        return found

    def num_also_in(self, other: CaptionAccumulator) -> int:
        """Number of distinct captions that the other accumulator contains as well."""
        return len(np.intersect1d(np.asarray(self._captions), np.asarray(other._captions)))

    def _samples(self, positions: np.ndarray) -> np.ndarray:
        """Numbers of the samples of captions at these positions."""
        ends = np.cumsum(np.asarray(self._of_sample, dtype=np.int64))
        return np.searchsorted(ends, positions, side="right")

    def _groups(self) -> _Groups:
        if self._grouped is None:
            self._grouped = _groups(np.asarray(self._captions), np.asarray(self._videos))
        return self._grouped

    def _equal_probability(self, groups: _Groups) -> float:
        """Share of the pairs of samples, weighted by the probability that the captions agree."""
        num_samples = len(self._of_sample)
        if num_samples < 2:
            return 0.0
        of_sample = np.asarray(self._of_sample)
        drawn = 1 / of_sample[self._samples(groups.order)]
        # Expected draws of a caption: per video, and over all videos.
        per_video = np.add.reduceat(drawn, groups.pair_starts) if len(drawn) else drawn
        overall = np.bincount(groups.of_pair, per_video)
        # Twice the pairs of samples of different videos.
        agreeing = overall**2 - np.bincount(groups.of_pair, per_video**2)
        return float(agreeing.sum()) / (num_samples * (num_samples - 1))


def expected_equal_pairs(equal_probability: float, num_samples: int, batch: int) -> float:
    """Expected number of pairs in a batch that show different videos and have equal captions.

    Args:
        equal_probability: As in `CaptionStatistics`.
        num_samples: Samples of the data set. An epoch draws each of them once; a larger batch
            continues with the next epoch.
        batch: Pairs of a global batch.
    """
    if num_samples < 2:
        return 0.0
    whole, rest = divmod(batch, num_samples)
    # Every sample is drawn `whole` times, and `rest` of them once more. This is the expected
    # product of the numbers of draws of two samples, times the number of pairs of samples.
    pairs = num_samples * (num_samples - 1) * whole**2 + rest * (rest - 1)
    pairs += 2 * whole * rest * (num_samples - 1)
    return equal_probability * pairs / 2


class _Groups(NamedTuple):
    """Numbers of distinct captions, and the captions of several videos, grouped.

    A pair is a distinct (caption, video). With 63 bits, one in 184,000 data sets of ten million
    distinct captions has two captions of one hash.
    """

    num_distinct: int
    num_pairs: int
    order: np.ndarray
    """Positions of the shared captions in the order of adding, sorted by hash, then by video."""
    starts: np.ndarray
    """First place of each distinct shared caption in `order`."""
    pair_starts: np.ndarray
    """First place of each pair of a shared caption in `order`."""
    of_pair: np.ndarray
    """Number of the distinct shared caption of each pair."""
    num_videos: np.ndarray
    """Videos of each distinct shared caption."""


def _groups(captions: np.ndarray, videos: np.ndarray) -> _Groups:
    order = np.lexsort((videos, captions))
    is_new_caption = _differs_from_previous(captions[order])
    is_new_pair = is_new_caption | _differs_from_previous(videos[order])
    num_distinct, num_pairs = int(is_new_caption.sum()), int(is_new_pair.sum())
    # Few captions are shared, so the rest leaves here.
    starts = np.flatnonzero(is_new_caption)
    num_videos = np.add.reduceat(is_new_pair, starts, dtype=np.int64) if len(starts) else starts
    is_shared = np.repeat(num_videos > 1, np.diff(starts, append=len(order)))
    order, is_new_caption, is_new_pair = (
        each[is_shared] for each in (order, is_new_caption, is_new_pair)
    )
    starts, pair_starts = np.flatnonzero(is_new_caption), np.flatnonzero(is_new_pair)
    of_pair = np.searchsorted(starts, pair_starts, side="right") - 1
    num_videos = np.bincount(of_pair)
    return _Groups(num_distinct, num_pairs, order, starts, pair_starts, of_pair, num_videos)


def _differs_from_previous(values: np.ndarray) -> np.ndarray:
    """True for each value that differs from the one before it, and for the first."""
    differs = np.ones(len(values), dtype=bool)
    differs[1:] = values[1:] != values[:-1]
    return differs
