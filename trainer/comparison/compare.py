"""Compares evaluations of one test set: intervals, queries won and lost, paired tests, seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvr.trainer.comparison.runs import (
    DIRECTIONS,
    StoredEvaluation,
    check_same_queries,
    read_evaluation,
    seed_groups,
)
from tvr.trainer.comparison.statistics import (
    CONFIDENCE,
    METRICS,
    SAMPLES,
    Difference,
    Interval,
    intervals,
    metrics,
    paired_differences,
)
from tvr.trainer.records import TABLE_COLUMNS

COLUMNS = {name: key for name, key in TABLE_COLUMNS.items() if key in METRICS}
"""Titles of the metrics that follow from ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """Metrics of one run in one direction."""

    run: str
    values: Mapping[str, float]
    intervals: Mapping[str, Interval]
    against_first: Contest | None
    """None for the first run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """A run against the first one, on the same queries."""

    won: int
    """Queries whose rank is better than the first run's."""
    lost: int
    tied: int
    differences: Mapping[str, Difference]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A metric over several runs that differ in their seed."""

    mean: float
    deviation: float | None
    """Standard deviation of the runs, with n - 1; None for one run."""
    low: float
    high: float
    """Smallest and largest value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedGroup:
    """Runs that differ only in their seed, in one direction."""

    name: str
    runs: tuple[str, ...]
    spreads: Mapping[str, Spread]


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionComparison:
    """All runs in one direction."""

    queries: int
    videos: int
    """Videos that have a query: as many are drawn in a resample."""
    runs: tuple[RunResult, ...]
    groups: tuple[SeedGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Evaluations of one test set side by side, by their raw ranks.

    Recalls are in percent; ranks start at 1. Dual softmax and QB-Norm are not compared.
    """

    runs: tuple[str, ...]
    steps: tuple[int | None, ...]
    gallery: int
    directions: Mapping[str, DirectionComparison]
    notes: tuple[str, ...]
    samples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values."""
        return asdict(self) | {
            "scores": "raw",
            "confidence": CONFIDENCE,
            "resampled": "videos",
        }

    def table(self) -> str:
        """The comparison as text for a terminal."""
        lines = [
            f"{self.gallery:,} videos, raw ranks; {100 * CONFIDENCE:.0f} % intervals of"
            f" {self.samples:,} resamples of the videos (seed {self.seed})"
        ]
        for number, (run, step) in enumerate(zip(self.runs, self.steps, strict=True), 1):
            lines.append(f"  {number}  {run}" + ("" if step is None else f", step {step}"))
        for direction, part in self.directions.items():
            lines += ["", *_direction_lines(direction.replace("_", " "), part)]
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])


def compare_paths(
    paths: Sequence[Path],
    *,
    by_seed: bool = False,
    groups: Sequence[str] = (),
    samples: int = SAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compares stored evaluations, all with the first.

    Args:
        paths: Folders of runs, or JSON files of `tvr evaluate`; at least two.
        by_seed: Groups runs whose settings differ only in the seed, see `seed_groups`.
        groups: Name of each run's group instead; empty: no groups.
        samples: Number of resamples.
        seed: Of the resamples.

    Raises:
        ValueError: too few runs, results that cannot be read, or different test sets.
    """
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} runs are given; a comparison needs at least two")
    runs = [read_evaluation(path) for path in paths]
    return compare(runs, by_seed=by_seed, groups=groups, samples=samples, seed=seed)


def compare(
    runs: Sequence[StoredEvaluation],
    *,
    by_seed: bool = False,
    groups: Sequence[str] = (),
    samples: int = SAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compares evaluations; arguments and errors as `compare_paths`."""
    if groups and len(groups) != len(runs):
        raise ValueError(f"--group has {len(groups)} names for {len(runs)} runs; each needs one")
    if groups and by_seed:
        raise ValueError("give --seeds or --group, not both")
    check_same_queries(runs)
    names = seed_groups(runs) if by_seed else tuple(groups)
    notes = tuple(
        f"{run.name} has no ranks from video to text, which files of earlier releases lack:"
        " that direction is left out"
        for run in runs
        if "video_to_text" not in run.directions
    )
    shared = [name for name in DIRECTIONS if all(name in run.directions for run in runs)]
    return Comparison(
        runs=tuple(run.name for run in runs),
        steps=tuple(run.step for run in runs),
        gallery=runs[0].videos,
        directions={name: _direction(runs, name, names, samples, seed) for name in shared},
        notes=notes,
        samples=samples,
        seed=seed,
    )


def _direction(
    runs: Sequence[StoredEvaluation], name: str, groups: Sequence[str], samples: int, seed: int
) -> DirectionComparison:
    first = runs[0].directions[name]
    videos = first.videos
    results = []
    for place, run in enumerate(runs):
        ranks = run.directions[name].ranks
        contest = None
        if place:
            contest = Contest(
                won=int((ranks < first.ranks).sum()),
                lost=int((ranks > first.ranks).sum()),
                tied=int((ranks == first.ranks).sum()),
                differences=paired_differences(
                    ranks, first.ranks, videos, samples=samples, seed=seed
                ),
            )
        results.append(
            RunResult(
                run=run.name,
                values=metrics(ranks),
                intervals=intervals(ranks, videos, samples=samples, seed=seed),
                against_first=contest,
            )
        )
    return DirectionComparison(
        queries=len(first.ranks),
        videos=len(set(videos)),
        runs=tuple(results),
        groups=_groups(results, groups),
    )


def _groups(results: Sequence[RunResult], names: Sequence[str]) -> tuple[SeedGroup, ...]:
    found = []
    for name in dict.fromkeys(names):
        members = [one for one, group in zip(results, names, strict=True) if group == name]
        spreads = {
            metric: _spread([one.values[metric] for one in members]) for metric in COLUMNS.values()
        }
        found.append(SeedGroup(name=name, runs=tuple(one.run for one in members), spreads=spreads))
    return tuple(found)


def _spread(values: Sequence[float]) -> Spread:
    return Spread(
        mean=float(np.mean(values)),
        deviation=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        low=min(values),
        high=max(values),
    )


def shown_interval(value: float, interval: Interval) -> str:
    """A metric with its interval, such as 45.2 [42.1, 48.3]."""
    return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def shown_difference(found: Difference) -> str:
    """A difference with its interval, such as +1.3 [+0.2, +2.4]."""
    return f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def shown_p(p: float) -> str:
    """A p value with three digits after the point, or as a power of ten."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def shown_spread(found: Spread) -> str:
    """Mean and standard deviation over seeds, with the range."""
    deviation = "" if found.deviation is None else f" ± {found.deviation:.2f}"
    return f"{found.mean:.1f}{deviation} [{found.low:.1f}, {found.high:.1f}]"


def _direction_lines(title: str, part: DirectionComparison) -> list[str]:
    rows = [(title, *COLUMNS)]
    rows += [
        (str(number), *(shown_interval(one.values[m], one.intervals[m]) for m in COLUMNS.values()))
        for number, one in enumerate(part.runs, 1)
    ]
    for number, one in enumerate(part.runs, 1):
        if one.against_first:
            found = [one.against_first.differences[metric] for metric in COLUMNS.values()]
            rows.append((f"{number} - 1", *(shown_difference(each) for each in found)))
            rows.append(("", *(f"p {shown_p(each.p)}" for each in found)))
    rows += [
        (f"{one.name} ({len(one.runs)} runs)", *(shown_spread(s) for s in one.spreads.values()))
        for one in part.groups
    ]
    lines = _columns(rows)
    lines[0] += f"   ({part.queries:,} queries of {part.videos:,} videos)"
    return lines + [
        f"{number} against 1: {one.against_first.won:,} queries won, {one.against_first.lost:,}"
        f" lost, {one.against_first.tied:,} tied"
        for number, one in enumerate(part.runs, 1)
        if one.against_first
    ]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
