"""Stored results of the evaluation of a step; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvr.trainer.monitoring.run_log import LOG, read_log
from tvr.trainer.run_files import EVALUATION, step_evaluation


def stored_results(run_dir: Path, step: int) -> Mapping[str, Any] | None:
    """The evaluation of a step.

    A later evaluation of that step alone comes first, then evaluation.json, and last the log, which
    has the numbers without the queries.

    Returns:
        Its summary, and "queries" if a file has them; None if the step was not evaluated.
    """
    for name in (step_evaluation(step), EVALUATION):
        path = run_dir / name
        if path.is_file() and (found := json.loads(path.read_text()))["step"] == step:
            return found
    log = run_dir / LOG
    events = read_log(log.read_text()).evaluations if log.is_file() else []
    return next((event for event in events if event["step"] == step), None)
