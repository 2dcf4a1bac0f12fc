"""Plain records that pass between the parts of the trainer.

The module imports no torch at run time, so pages and the monitor can use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tvr.data_prep.records import Replacement
from tvr.trainer.errors import PreflightFailed

if TYPE_CHECKING:
    from tvr.kernels.ranking import RetrievalMetrics

TABLE_COLUMNS = {
    "R@1": "recall_at_1",
    "R@5": "recall_at_5",
    "R@10": "recall_at_10",
    "R@50": "recall_at_50",
    "MdR": "median_rank",
    "MnR": "mean_rank",
    "mAP": "mean_average_precision",
    "nDCG@10": "ndcg_at_10",
}
WAYS = {
    "text_to_video": "text to video",
    "video_to_text": "video to text",
    "mean": "mean of both",
}
FIRST_COLUMN = 15
PACKAGES = ("tvr", "torch", "transformers", "numpy")
"""Packages whose versions a stored evaluation names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Results on one test set. Recalls and accuracy are in percent; ranks start at 1."""

    data: str
    videos: int
    captions: int
    left_out: tuple[Replacement, ...]
    """Samples that could not be read."""
    metrics: RetrievalMetrics
    binding_accuracy: float | None
    """Percentage of captions that score higher with their own clip than with its counterpart,
    which shows the same scene with exchanged attributes; None without such a set."""
    queries: list[dict[str, Any]]
    """For each caption: its text, its video's key, that video's rank, and the best videos with
    their similarities. Empty on every rank but 0."""
    video_queries: list[dict[str, Any]] = field(default_factory=list)
    """For each video with a caption: its key, and the rank of its best caption. On rank 0 only."""
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    """By direction, the 95 % bootstrap interval of each metric, see `comparison.statistics`. On
    rank 0 only."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """Name and version of the protocol, and its choices."""
    rescored: Mapping[str, Any] = field(default_factory=dict)
    """Metrics by other scores, with their settings, by the names "dual_softmax" and "qb_norm"."""
    step: int | None = None
    """Step of the checkpoint that was evaluated; None during training."""
    model: str | None = None
    """Name of a model that is not named by a run's folder."""

    @property
    def score(self) -> float:
        """Mean R@1 of both directions; the best checkpoint is the one with the highest score."""
        value = self.metrics.mean["recall_at_1"]
        assert value is not None  # both directions have it
        return value

    def summary(self) -> dict[str, Any]:
        """All results except the queries, as logged and stored."""
        named: dict[str, Any] = {} if self.model is None else {"model": self.model}
        rescored = {"rescored": dict(self.rescored)} if self.rescored else {}
        return (
            named
            | {
                "data": self.data,
                "protocol": dict(self.protocol),
                "videos": self.videos,
                "captions": self.captions,
                "left_out": len(self.left_out),
                "text_to_video": asdict(self.metrics.text_to_video),
                "video_to_text": asdict(self.metrics.video_to_text),
                "mean": self.metrics.mean,
                "binding_accuracy": self.binding_accuracy,
            }
            | rescored
        )

    def document(self) -> dict[str, Any]:
        """The whole result, with versions and every query, as evaluation.json holds it."""
        return {
            "step": self.step,
            **self.summary(),
            "intervals": self.intervals,
            "versions": {name: version(name) for name in PACKAGES},
            "queries": self.queries,
            "video_queries": self.video_queries,
        }

    def table(self) -> str:
        """The results as text for a terminal."""
        step = {"step": self.step} if self.step else {}
        return results_table(self.summary() | {"intervals": self.intervals} | step)


def results_table(summary: Mapping[str, Any]) -> str:
    """Formats an evaluation's summary as text for a terminal, with its "step" if it has one."""
    of = f", checkpoint of step {summary['step']}" if "step" in summary else ""
    if "model" in summary:
        of += f"\nmodel: {summary['model']}"
    lines = [f"{summary['captions']} captions, {summary['videos']} videos ({summary['data']}){of}"]
    if "protocol" in summary:
        lines.append(protocol_line(summary["protocol"]))
    for block in metric_blocks(summary):
        names = {name: key for name, key in TABLE_COLUMNS.items() if key in block.columns}
        title = block.title
        if len(title) >= FIRST_COLUMN:
            lines.append(title)
            title = ""
        lines.append(f"{title:<{FIRST_COLUMN}}" + "".join(f"{name:>8}" for name in names))
        for way, values in block.ways.items():
            cells = (values.get(key) for key in names.values())
            shown = "".join(f"{'-':>8}" if cell is None else f"{cell:8.1f}" for cell in cells)
            lines.append(f"{WAYS[way]:<{FIRST_COLUMN}}{shown}")
    lines += _interval_lines(summary.get("intervals", {}))
    if summary["binding_accuracy"] is not None:
        lines.append(f"binding accuracy {summary['binding_accuracy']:.1f} % (chance 50 %)")
    if summary["left_out"]:
        lines.append(f"{summary['left_out']} unreadable samples were left out")
    return "\n".join(lines)


def _interval_lines(intervals: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """A line for each direction, with the ends of each metric's 95 % interval."""
    if not intervals:
        return []
    names = [
        (name, key)
        for name, key in TABLE_COLUMNS.items()
        if all(key in of for of in intervals.values())
    ]
    lines = [
        "95 % intervals of the raw results:",
        " " * FIRST_COLUMN + "".join(f"{name:>16}" for name, _ in names),
    ]
    for way, of in intervals.items():
        cells = ("{:.1f} to {:.1f}".format(*of[key]) for _, key in names)
        lines.append(f"{WAYS[way]:<{FIRST_COLUMN}}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


@dataclass(frozen=True, slots=True)
class MetricBlock:
    """Metrics of one way of scoring. Blocks are shown apart and never mixed."""

    title: str
    ways: Mapping[str, Mapping[str, Any]]
    """Metrics of each direction, and of their mean; keys as in WAYS."""

    @property
    def columns(self) -> list[str]:
        """The metrics of TABLE_COLUMNS that it has."""
        ways = self.ways.values()
        return [
            key
            for key in TABLE_COLUMNS.values()
            if any(values.get(key) is not None for values in ways)
        ]


def metric_blocks(summary: Mapping[str, Any]) -> list[MetricBlock]:
    """The blocks of an evaluation's summary, of this or of an earlier release."""
    blocks = [MetricBlock("raw", _ways(summary))]
    for name, found in summary.get("rescored", {}).items():
        blocks.append(MetricBlock(_title(name, found), _ways(found)))
    return blocks


def _title(name: str, block: Mapping[str, Any]) -> str:
    if name == "dual_softmax":
        return f"dual softmax, temperature {block['temperature']:g}: sees all test queries at once"
    if name == "qb_norm":
        dropped = block["dropped_test_captions"]
        return (
            f"QB-Norm, beta {block['beta']:g}, bank of {block['bank_captions']:,} captions of"
            f" {block['bank']}" + (f", {dropped:,} test captions dropped" if dropped else "")
        )
    return name


def _ways(block: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {way: block[way] for way in WAYS if way in block}


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """One line on the protocol, with the rule for equal captions and their number."""
    line = f"protocol: {protocol['name']}, version {protocol['version']}"
    equal = protocol["captions_with_equals"]
    if equal is None:
        return line
    own = "the videos of all of them are right"
    rule = own if protocol["equal_captions"] == "right" else "only the own video is right"
    return f"{line}; {equal} captions equal one of another video: {rule}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveResult:
    """The result of a save. Apart from `blocked_s` and `seconds` it is the same on every rank."""

    step: int
    error: str | None
    """The error on the lowest rank that failed; None: the checkpoint is published."""
    num_bytes: int
    blocked_s: float
    """Seconds for which steps waited on this rank: for the copy and for the agreement of the ranks,
    or for the whole save without `background`."""
    seconds: float
    """From the start to the publication."""
    background: bool
    """True if a copy was written while training continued."""
    no_room: str | None = None
    """Why the state was not copied although `background` was set."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A failed check on one rank."""

    rank: int
    text: str
    is_node_fault: bool
    """True if the node may be at fault, False if the settings are."""


def raise_findings(findings: Sequence[Finding], hosts: Sequence[str]) -> None:
    """Raises PreflightFailed if there are findings.

    Args:
        hosts: Host of every rank.
    """
    if not findings:
        return
    lines = [f"rank {found.rank} on {hosts[found.rank]}: {found.text}" for found in findings]
    # If settings are wrong as well, another node does not help.
    other_nodes_help = all(found.is_node_fault for found in findings)
    rank_at_fault = min(found.rank for found in findings) if other_nodes_help else None
    raise PreflightFailed(lines, rank_at_fault)
