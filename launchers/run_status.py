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


FileState = tuple[int, int, int]
"""Inode, size and modification time of a file. Two states are only compared for equality: the time
comes from a file server, whose clock may differ from this machine's."""


@dataclass(frozen=True, slots=True)
class RunMark:
    """What a run folder held at one moment, so that later files are recognised without a clock."""

    attempt: int
    """Number of the newest attempt; 0 without one."""
    reports: Mapping[str, FileState]
    """State of each failure report, by file name."""


def mark_run(run_dir: Path) -> RunMark:
    """Marks the beginning of an attempt: call it before the ranks start."""
    newest = _newest_attempt(run_dir)
    return RunMark(
        attempt=int(newest.stem) if newest else 0,
        reports=file_states(run_dir / "failures"),
    )


def file_states(folder: Path) -> dict[str, FileState]:
    """States of the JSON files of a folder by name; empty if the folder does not exist."""
    states: dict[str, FileState] = {}
    for path in folder.glob("*.json"):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue  # its process has just removed it
        states[path.name] = (found.st_ino, found.st_size, found.st_mtime_ns)
    return states


def reported_failure(run_dir: Path, since: RunMark) -> ReportedFailure | None:
    """Returns the newest failure reported since a mark, or None."""
    folder = run_dir / "failures"
    new = [
        (state[2], name)
        for name, state in file_states(folder).items()
        if since.reports.get(name) != state
    ]
    for _, name in sorted(new, reverse=True):
        try:
            report = json.loads((folder / name).read_text())
        except json.JSONDecodeError:
            continue  # the rank was killed while it wrote the report
        error = " ".join(report["error"].split())
        return ReportedFailure(report["of"], f"rank {report['rank']} on {report['host']}: {error}")
    return None


def is_superseded(run_dir: Path, job_id: str, since: RunMark) -> bool:
    """True if another SLURM job has started on the run since a mark.

    The trainer then refuses the writes of every earlier attempt.
    """
    newest = _newest_attempt(run_dir)
    if newest is None or int(newest.stem) <= since.attempt:
        return False
    try:
        return json.loads(newest.read_text()).get("job") != job_id
    except json.JSONDecodeError:
        return False  # the attempt is being recorded


def _newest_attempt(run_dir: Path) -> Path | None:
    return max((run_dir / "attempts").glob("*.json"), default=None, key=lambda path: int(path.stem))


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
