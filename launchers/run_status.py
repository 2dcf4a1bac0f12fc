"""Progress, failures and owner of a run, read from the files the trainer writes.

The files are log.jsonl, failures/ and attempts/ in the run folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# SLURM delivered the signal up to 18 s late where this was measured.
SIGNAL_DELAY_S = 30.0
DEFAULT_NOTICE_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """Newest step and checkpoint of a run, and its longest times so far."""

    saved_step: int
    """Step of the newest checkpoint; 0 without a checkpoint."""
    longest_save_s: float
    longest_step_s: float
    longest_evaluation_s: float
    step: Mapping[str, Any]
    """Newest `step` event of log.jsonl; empty before the first step."""


def read_progress(run_dir: Path) -> RunProgress:
    """Reads log.jsonl of a run, which may be running or may not have started."""
    saved_step, save_s, step_s, evaluation_s = 0, 0.0, 0.0, 0.0
    step: Mapping[str, Any] = {}
    for event in _events(run_dir / "log.jsonl"):
        match event.get("event"):
            case "saved":
                saved_step = max(saved_step, event["step"])
                save_s = max(save_s, event["seconds"])
            case "step":
                step = event
                step_s = max(step_s, event.get("step_s", 0.0))
            case "evaluation":
                evaluation_s = max(evaluation_s, event.get("seconds", 0.0))
    return RunProgress(
        saved_step=saved_step,
        longest_save_s=save_s,
        longest_step_s=step_s,
        longest_evaluation_s=evaluation_s,
        step=step,
    )


def notice_seconds(progress: RunProgress) -> int:
    """Seconds before the time limit at which the run must be notified, to save in time."""
    if not progress.longest_save_s:
        return DEFAULT_NOTICE_S
    # The notice may arrive as an evaluation begins. Ranks act on it after the following step.
    busy_s = progress.longest_evaluation_s + progress.longest_step_s
    return math.ceil(busy_s + progress.longest_save_s + SIGNAL_DELAY_S)


@dataclass(frozen=True, slots=True)
class ReportedFailure:
    """A failure that a rank reported before it exited."""

    rank: int | None
    """Rank at fault; it may differ from the reporting rank. None: no rank in particular."""
    reason: str


def reported_failure(run_dir: Path, since_s: float) -> ReportedFailure | None:
    """Returns the newest failure reported since `since_s` (Unix time), or None."""
    files = (run_dir / "failures").glob("*.json")
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        if path.stat().st_mtime < since_s:
            return None
        try:
            report = json.loads(path.read_text())
        except json.JSONDecodeError:
            continue  # the rank was killed while it wrote the report
        error = " ".join(report["error"].split())
        return ReportedFailure(report["of"], f"rank {report['rank']} on {report['host']}: {error}")
    return None


def is_superseded(run_dir: Path, job_id: str, since_s: float) -> bool:
    """True if another SLURM job has started on the run since `since_s` (Unix time).

    The trainer then refuses the writes of every earlier attempt.
    """
    newest = max((run_dir / "attempts").glob("*.json"), default=None)
    if newest is None or newest.stat().st_mtime < since_s:
        return False
    try:
        return json.loads(newest.read_text()).get("job") != job_id
    except json.JSONDecodeError:
        return False  # the attempt is being recorded


def _events(log: Path) -> Iterator[Mapping[str, Any]]:
    if not log.exists():
        return
    with log.open() as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue  # incomplete: being written, or cut by a crash
            if isinstance(event, dict):
                yield event
