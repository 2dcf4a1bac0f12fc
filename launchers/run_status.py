"""How far a run is, and whose: read from what the trainer writes into its folder, log.jsonl,
failures/ and attempts/."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# SLURM's signal comes up to 18 s late where this was measured.
SIGNAL_LATE_S = 30.0
UNMEASURED_NOTICE_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The newest of each kind of event; empty: there was none."""

    saved_step: int
    """Of the newest checkpoint; 0: none."""
    longest_save_s: float
    longest_step_s: float
    longest_evaluation_s: float
    step: Mapping[str, Any]
    evaluation: Mapping[str, Any]


def read_progress(run_dir: Path) -> Progress:
    """Of a run that may still be going on, or may not have begun."""
    saved_step, save_s, step_s, evaluation_s = 0, 0.0, 0.0, 0.0
    step: Mapping[str, Any] = {}
    evaluation: Mapping[str, Any] = {}
    for event in _events(run_dir / "log.jsonl"):
        match event.get("event"):
            case "saved":
                saved_step = max(saved_step, event["step"])
                save_s = max(save_s, event["seconds"])
            case "step":
                step = event
                step_s = max(step_s, event.get("step_s", 0.0))
            case "evaluation":
                evaluation = event
                evaluation_s = max(evaluation_s, event.get("seconds", 0.0))
    return Progress(
        saved_step=saved_step,
        longest_save_s=save_s,
        longest_step_s=step_s,
        longest_evaluation_s=evaluation_s,
        step=step,
        evaluation=evaluation,
    )


def notice_for(progress: Progress) -> int:
    """Seconds before the end of its time at which the run must hear of it."""
    if not progress.longest_save_s:
        return UNMEASURED_NOTICE_S
    # It may come as an evaluation begins, and is heard after the step that follows.
    busy_s = progress.longest_evaluation_s + progress.longest_step_s
    return math.ceil(busy_s + progress.longest_save_s + SIGNAL_LATE_S)


@dataclass(frozen=True, slots=True)
class ToldFailure:
    """What the first rank to fail said."""

    of: int
    """The rank whose node may be to blame; it need not be the one that spoke."""
    reason: str


def told_failure(run_dir: Path, since_s: float) -> ToldFailure | None:
    """None: no rank has failed with words since `since_s` (Unix time)."""
    files = (run_dir / "failures").glob("*.json")
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        if path.stat().st_mtime < since_s:
            return None
        try:
            told = json.loads(path.read_text())
        except json.JSONDecodeError:
            continue  # it was killed before it had spoken
        reason = f"rank {told['rank']} on {told['host']}: {' '.join(told['error'].split())}"
        return ToldFailure(told["of"], reason)
    return None


def taken_over(run_dir: Path, job_id: str, since_s: float) -> bool:
    """Whether another job of SLURM has begun at the run since `since_s` (Unix time), and after this
    one: the trainer fences what began before it."""
    newest = max((run_dir / "attempts").glob("*.json"), default=None)
    if newest is None or newest.stat().st_mtime < since_s:
        return False
    try:
        return json.loads(newest.read_text()).get("job") != job_id
    except json.JSONDecodeError:
        return False  # it is beginning


def _events(log: Path) -> Iterator[Mapping[str, Any]]:
    if not log.exists():
        return
    with log.open() as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue  # being written, or torn by a crash
            if isinstance(event, dict):
                yield event
