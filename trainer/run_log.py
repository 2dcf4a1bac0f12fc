"""Reads log.jsonl back: the steps and evaluations of a run, whatever interrupted it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]


@dataclass
class RunLog:
    """What log.jsonl tells: steps and evaluations in order of step, everything else as it came."""

    steps: list[Event] = field(default_factory=list)
    evaluations: list[Event] = field(default_factory=list)
    replaced: list[Event] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    unreadable_lines: int = 0


def read_log(text: str) -> RunLog:
    """Sorts the events of log.jsonl. A resumed run logs some steps again: the last word counts.

    A line that is no JSON object (torn by a crash) is counted; an event of another kind is ignored.
    """
    log = RunLog()
    steps: dict[int, Event] = {}
    evaluations: dict[int, Event] = {}
    for event, elapsed_s in _events(text, log):
        match event.get("event"):
            case "step":
                steps[event["step"]] = {**event, "elapsed_s": elapsed_s}
            case "evaluation":
                evaluations[event["step"]] = {**event, "elapsed_s": elapsed_s}
            case "replaced":
                log.replaced.append(event)
            case "resumed":
                log.resumed_at.append(event["step"])
    log.steps = [steps[step] for step in sorted(steps)]
    log.evaluations = [evaluations[step] for step in sorted(evaluations)]
    return log


def _events(text: str, log: RunLog) -> list[tuple[Event, float]]:
    """Events with the seconds trained so far; each restart's clock goes on from the last one's."""
    events = []
    before_s = last_s = 0.0
    for line in text.splitlines():
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            event = None
        if not isinstance(event, dict):
            log.unreadable_lines += 1
            continue
        if "time_s" in event:
            if before_s + event["time_s"] < last_s:
                before_s = last_s
            last_s = before_s + event["time_s"]
        events.append((event, last_s))
    return events
