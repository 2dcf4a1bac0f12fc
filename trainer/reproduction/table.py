"""The table of a reproduction: zero-shot, trained seeds, published rows, and what was reached."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tvr.data_prep.annotations.benchmarks import BENCHMARKS
from tvr.trainer.comparison.runs import StoredEvaluation, check_same_queries, read_evaluation
from tvr.trainer.comparison.statistics import METRICS
from tvr.trainer.reproduction.interval import SeedInterval, recall_interval
from tvr.trainer.reproduction.packs import other_towers
from tvr.trainer.reproduction.plan import ReproductionPlan

DIRECTIONS = {"text_to_video": "text to video", "video_to_text": "video to text"}
PROTOCOLS = {"raw": "raw", "dual_softmax": "dual softmax"}
COLUMNS = {
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "recall_at_10": "R@10",
    "median_rank": "MdR",
    "mean_rank": "MnR",
}

Numbers = Mapping[str, Mapping[str, float]]
"""Metrics by direction and name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GoalVerdict:
    """Whether R@1 of a direction reaches the published number."""

    direction: str
    published: float
    found: SeedInterval
    is_reached: bool
    """True if the 95 % interval holds the published number, or lies above it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproductionTable:
    """The results of all seeds beside the published rows."""

    plan: ReproductionPlan
    videos: int
    """Videos of the test split that was packed."""
    published_videos: int | None
    zero_shot: Mapping[str, Numbers]
    """By protocol."""
    seeds: Mapping[int, Mapping[str, Numbers]]
    """By seed and protocol."""
    verdicts: tuple[GoalVerdict, ...]

    @property
    def is_complete(self) -> bool:
        """True if the test split has all its published videos: a smaller one is easier."""
        return self.published_videos in (None, self.videos)

    @property
    def is_reached(self) -> bool:
        """True if the test split is complete and every direction reaches its number."""
        return self.is_complete and all(verdict.is_reached for verdict in self.verdicts)

    def document(self) -> dict[str, Any]:
        """All numbers, for reproduction.json."""
        options = self.plan.options
        rows = self.plan.pack.published[options.towers]
        return {
            "benchmark": options.benchmark,
            "title": self.plan.pack.title,
            "recipe": self.plan.pack.recipes[options.towers],
            "videos": self.videos,
            "published_videos": self.published_videos,
            "zero_shot": self.zero_shot,
            "seeds": {str(seed): found for seed, found in self.seeds.items()},
            "published": [asdict(row) for row in rows],
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "reached": self.is_reached,
            "commands": [step.line for step in self.plan.steps],
        }

    def markdown(self) -> str:
        """The table as text."""
        options = self.plan.options
        lines = [
            f"# {self.plan.pack.title}",
            "",
            f"Recipe `{self.plan.pack.recipes[options.towers]}`, towers `{options.pretrained}`,"
            f" {_counted(len(self.seeds), 'seed')}, {self.videos:,} test videos{self._missing()}.",
        ]
        for direction, title in DIRECTIONS.items():
            lines += ["", f"## {title.capitalize()}", ""]
            head = ("row", "protocol", *COLUMNS.values())
            cells = [head, ["---"] * len(head), *self._rows(direction)]
            lines += [f"| {' | '.join(row)} |" for row in cells]
        lines += ["", "## Reached?", ""]
        lines += [f"- {_verdict_line(one, self.goal_name)}" for one in self.verdicts]
        if (note := other_towers(options.pretrained, options.towers)) is not None:
            lines.append(f"- {note}.")
        if not self.is_complete:
            lines.append("- The test split is not complete: no number can be compared.")
        lines += ["", "Published rows are from:", ""]
        for row in self.plan.pack.published[options.towers]:
            lines.append(f"- {row.method}: {row.source}")
        return "\n".join(lines) + "\n"

    @property
    def goal_name(self) -> str:
        return self.plan.pack.goal(self.plan.options.towers).method

    def _missing(self) -> str:
        if self.published_videos is None:
            return ""
        return " as published" if self.is_complete else f" of {self.published_videos:,} published"

    def _rows(self, direction: str) -> Iterable[list[str]]:
        for key, name in PROTOCOLS.items():
            yield ["zero-shot, mean of frames", name, *_cells([self.zero_shot[key][direction]])]
        for key, name in PROTOCOLS.items():
            found = [numbers[key][direction] for numbers in self.seeds.values()]
            yield [f"tvr, mean of {_counted(len(found), 'seed')}", name, *_cells(found)]
        for row in self.plan.pack.published[self.plan.options.towers]:
            recalls = getattr(row, direction)
            if recalls:
                cells = [f"{recalls[k]:.1f}" if k in recalls else "" for k in (1, 5, 10)]
                yield [row.method, "raw", *cells, "", ""]


def read_table(plan: ReproductionPlan, *, samples: int = 10_000) -> ReproductionTable:
    """Reads the results of a finished plan.

    Raises:
        ValueError: a result is missing or damaged, or the seeds were evaluated on other queries.
    """
    found = [read_evaluation(path) for path in plan.trained.values()]
    check_same_queries([read_evaluation(plan.zero_shot), *found])
    split = BENCHMARKS[plan.pack.dataset][plan.pack.test]
    return ReproductionTable(
        plan=plan,
        videos=found[0].videos,
        published_videos=split.published,
        zero_shot=_numbers(plan.zero_shot),
        seeds={seed: _numbers(path) for seed, path in plan.trained.items()},
        verdicts=verdicts(plan, found, samples=samples),
    )


def verdicts(
    plan: ReproductionPlan, found: list[StoredEvaluation], *, samples: int = 10_000
) -> tuple[GoalVerdict, ...]:
    """Compares R@1 of all seeds with the published one, in each direction that has one."""
    goal = plan.pack.goal(plan.options.towers)
    results = []
    for direction in DIRECTIONS:
        published = getattr(goal, direction).get(1)
        if published is None:
            continue
        queries = [run.directions[direction] for run in found]
        interval = recall_interval(
            [one.ranks for one in queries], queries[0].videos, samples=samples
        )
        results.append(
            GoalVerdict(
                direction=direction,
                published=published,
                found=interval,
                is_reached=interval.high >= published,
            )
        )
    return tuple(results)


def _numbers(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """The metrics of a file of `tvr evaluate --json`, by protocol and direction."""
    stored = json.loads(path.read_text())
    blocks = {"raw": stored, "dual_softmax": stored["rescored"]["dual_softmax"]}
    return {
        name: {way: {key: block[way][key] for key in METRICS} for way in DIRECTIONS}
        for name, block in blocks.items()
    }


def _cells(found: list[Mapping[str, float]]) -> list[str]:
    """Mean over the seeds, with the standard deviation if there are several."""
    cells = []
    for key in COLUMNS:
        values = [numbers[key] for numbers in found]
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.1f}{spread}")
    return cells


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _verdict_line(verdict: GoalVerdict, goal: str) -> str:
    found = verdict.found
    word = "reaches" if verdict.is_reached else "does not reach"
    return (
        f"{DIRECTIONS[verdict.direction]}, raw R@1 {found.mean:.1f} [{found.low:.1f},"
        f" {found.high:.1f}] {word} {verdict.published:.1f} ({goal})"
    )
