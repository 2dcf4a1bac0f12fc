"""Finds samples with the same video within a data set, and shared by two data sets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tvr.data_prep.dataset.sample_table import SampleTable, hash_texts

COLUMNS = ("key", "video_id", "content")


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSample:
    """A sample of one data set that is also in another one."""

    row: int
    other_row: int
    by: tuple[str, ...]
    """Columns, of COLUMNS, in which the two samples are equal."""


def shared_samples(samples: SampleTable, others: SampleTable) -> list[SharedSample]:
    """Returns every pair of samples of two data sets with equal key, video_id or content."""
    by: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for name in COLUMNS:
        ours, theirs = _values(samples, name), _values(others, name)
        rows: defaultdict[int, list[int]] = defaultdict(list)
        for other_row in np.flatnonzero(np.isin(theirs, ours)).tolist():
            rows[int(theirs[other_row])].append(other_row)
        for row in np.flatnonzero(np.isin(ours, theirs)).tolist():
            for other_row in rows[int(ours[row])]:
                # Two texts may have one hash.
                if getattr(samples, name)[row] == getattr(others, name)[other_row]:
                    by[row, other_row].append(name)
    return [
        SharedSample(row=row, other_row=other_row, by=tuple(names))
        for (row, other_row), names in sorted(by.items())
    ]


def repeated_content(samples: SampleTable) -> Iterator[tuple[int, int]]:
    """Yields (row, first row) of samples with equal content but different video_id.

    Training would treat two samples of the same video as negatives of each other.
    """
    content = np.asarray(samples.content)
    _, first_rows, groups = np.unique(content, return_index=True, return_inverse=True)
    firsts, videos = first_rows[groups], _values(samples, "video_id")
    for row in np.flatnonzero(videos != videos[firsts]).tolist():
        yield row, int(firsts[row])


def repeated_keys(samples: SampleTable) -> dict[str, int]:
    """Returns the number of samples of each key that occurs more than once."""
    hashes = _values(samples, "key")
    _, groups, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[groups] > 1).tolist()
    found = Counter(str(samples.key[row]) for row in rows)
    return {key: count for key, count in found.items() if count > 1}


def _values(samples: SampleTable, name: str) -> np.ndarray:
    """A column as 64-bit numbers, texts by their hashes."""
    column = getattr(samples, name)
    return np.asarray(column) if name == "content" else hash_texts(column)
