"""Finds samples with the same video within a data set, and shared by two data sets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tvr.data_prep.dataset.manifest import SampleTable

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
        ours, theirs = getattr(samples, name), getattr(others, name)
        rows: defaultdict[object, list[int]] = defaultdict(list)
        for other_row in np.flatnonzero(np.isin(theirs, ours)).tolist():
            rows[theirs[other_row]].append(other_row)
        for row in np.flatnonzero(np.isin(ours, theirs)).tolist():
            for other_row in rows[ours[row]]:
                by[row, other_row].append(name)
    return [
        SharedSample(row=row, other_row=other_row, by=tuple(names))
        for (row, other_row), names in sorted(by.items())
    ]


def repeated_content(samples: SampleTable) -> Iterator[tuple[int, int]]:
    """Yields (row, first row) of samples with equal content but different video_id.

    Training would treat two samples of the same video as negatives of each other.
    """
    _, first_rows, groups = np.unique(samples.content, return_index=True, return_inverse=True)
    firsts = first_rows[groups]
    for row in np.flatnonzero(samples.video_id != samples.video_id[firsts]).tolist():
        yield row, int(firsts[row])
