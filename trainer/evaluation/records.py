"""The result of an evaluation, and its summary as a table.

The module imports no torch at run time, so pages and the run folder can use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tvr.data_prep.records import Replacement

if TYPE_CHECKING:
    from tvr.kernels.ranking import RetrievalMetrics

TABLE_COLUMNS = {
    "R@1": "recall_at_1",
    "R@5": "recall_at_5",
    "R@10": "recall_at_10",
    "MdR": "median_rank",
    "MnR": "mean_rank",
}


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
    """For each caption: its text, its video's key, that video's rank, and the top 5 videos."""

    @property
    def score(self) -> float:
        """Mean R@1 of both directions; the best checkpoint is the one with the highest score."""
        both = (self.metrics.text_to_video, self.metrics.video_to_text)
        return sum(way.recall_at_1 for way in both) / len(both)

    def summary(self) -> dict[str, Any]:
        """All results except the queries, as logged and stored."""
        return {
            "data": self.data,
            "videos": self.videos,
            "captions": self.captions,
            "left_out": len(self.left_out),
            "text_to_video": asdict(self.metrics.text_to_video),
            "video_to_text": asdict(self.metrics.video_to_text),
            "binding_accuracy": self.binding_accuracy,
        }

    def table(self) -> str:
        """The results as text for a terminal."""
        return results_table(self.summary())


def results_table(summary: Mapping[str, Any]) -> str:
    """Formats an evaluation's summary as text for a terminal."""
    lines = [
        f"{summary['captions']} captions, {summary['videos']} videos ({summary['data']})",
        " " * 15 + "".join(f"{name:>8}" for name in TABLE_COLUMNS),
    ]
    for direction in ("text_to_video", "video_to_text"):
        values = "".join(f"{summary[direction][name]:8.1f}" for name in TABLE_COLUMNS.values())
        lines.append(f"{direction.replace('_', ' '):<15}" + values)
    if summary["binding_accuracy"] is not None:
        lines.append(f"binding accuracy {summary['binding_accuracy']:.1f} % (chance 50 %)")
    if summary["left_out"]:
        lines.append(f"{summary['left_out']} unreadable samples were left out")
    return "\n".join(lines)
