"""The table of a set, and its files: a summary as JSON, and the ranks of all queries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from evidence.paired import Mean, compare, mean_of, rounded, values_of
from evidence.rows import FIRST, ROWS
from numpy.typing import NDArray
from tvr_bench.harness import machine, versions


@dataclass(frozen=True, slots=True)
class Table:
    """Ranks of all rows of a set, and what else a run says."""

    name: str
    seeds: Mapping[str, Sequence[int]]
    """Seeds of each row."""
    keys: Sequence[str]
    """(Q,) clips."""
    clusters: Sequence[str]
    """(Q,) what a resample draws whole: clips, or groups of clips."""
    ranks: Mapping[str, NDArray[np.int64]]
    """(S, 2, Q) by row: text to video, video to text."""
    more: Mapping[str, Mapping[str, Sequence[float | None]]]
    """Numbers of each seed by row and name."""
    settings: Mapping[str, Any]
    """Settings that all rows share."""

    def means(self, row: str) -> dict[str, Mean]:
        """The metrics of a row with their intervals."""
        values = values_of(self.ranks[row])
        return {name: mean_of(x, self.clusters) for name, x in values.items()}

    def against_first(self, row: str) -> dict[str, Mean] | None:
        """Paired differences from the first row over the seeds of both; None without such."""
        if row == FIRST or FIRST not in self.ranks:
            return None
        shared = [seed for seed in self.seeds[row] if seed in self.seeds[FIRST]]
        if not shared:
            return None
        mine, first = (
            self.ranks[each][[list(self.seeds[each]).index(seed) for seed in shared]]
            for each in (row, FIRST)
        )
        return compare(mine, first, self.clusters)

    def summary(self) -> dict[str, Any]:
        """What the committed JSON holds."""
        rows = []
        for row in self.ranks:
            against = self.against_first(row)
            rows.append(
                {
                    "row": row,
                    "settings": dict(ROWS[row]),
                    "seeds": list(self.seeds[row]),
                    "means": rounded(self.means(row)),
                    "against_first": None if against is None else rounded(against),
                    "by_seed": {
                        "recall_at_1": values_of(self.ranks[row])["recall_at_1"]
                        .mean(axis=1)
                        .round(3)
                        .tolist(),
                        **{
                            name: [None if x is None else round(x, 3) for x in values]
                            for name, values in self.more[row].items()
                        },
                    },
                }
            )
        return {
            "benchmark": f"evidence on {self.name}",
            "metrics": "mean of both ways; recalls in percent; 95 % intervals",
            "first": FIRST,
            "queries": len(self.keys),
            "clusters": len(set(self.clusters)),
            "versions": versions(),
            "machine": machine(),
            "settings": self.settings,
            "rows": rows,
        }

    def text(self) -> str:
        """The table as Markdown."""
        lines = [
            "| row | seeds | R@1 | R@10 | MRR | R@1 against the first row | MRR against it |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in self.ranks:
            means, against = self.means(row), self.against_first(row)
            names = ("recall_at_1", "mean_reciprocal_rank")
            shown = ["", ""] if against is None else [_signed(against[name]) for name in names]
            parts = [_plain(means[x]) for x in ("recall_at_1", "recall_at_10", names[1])]
            lines.append("| " + " | ".join([row, str(len(self.seeds[row])), *parts, *shown]) + " |")
        return "\n".join(lines)


def _plain(mean: Mean) -> str:
    low, high = mean.interval
    return f"{mean.value:.1f} ({low:.1f} to {high:.1f})"


def _signed(mean: Mean) -> str:
    low, high = mean.interval
    return f"{mean.value:+.2f} ({low:+.2f} to {high:+.2f})"


def write_results(table: Table, path: Path) -> None:
    """Writes the summary to `path`, and `STEM_ranks.npz` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ranks: dict[str, Any] = {f"ranks: {row}": x.astype(np.uint16) for row, x in table.ranks.items()}
    names = {"keys": np.array(table.keys), "clusters": np.array(table.clusters)}
    np.savez_compressed(ranks_file(path), **names, **ranks)
    path.write_text(json.dumps(table.summary(), indent=1) + "\n")


def ranks_file(path: Path) -> Path:
    """File with the ranks that belong to a summary."""
    return path.with_name(f"{path.stem}_ranks.npz")
