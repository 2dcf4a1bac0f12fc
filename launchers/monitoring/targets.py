"""Where Prometheus finds the hosts of a job: one file in a folder that its file_sd reads.

The ranks of each node say where they can be asked in run_dir/metrics/*.json, lists of groups as
file_sd has them: `[{"targets": ["host:port"], "labels": {...}}]`. The launcher joins those of this
attempt into one file, beside those of other runs; each task of an array into one of its own.
"""

from __future__ import annotations

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

from tvr.launchers.atomic_write import write_atomically
from tvr.launchers.job import TASK, Job, run_dir_of

METRICS = "metrics"


class Targets:
    """The file of one run, or of one task's."""

    def __init__(self, path: Path, metrics: Path, since_s: float) -> None:
        """Of what was written into the folder `metrics` after `since_s` (Unix time): before that it
        was another attempt."""
        self.path = path
        self._metrics = metrics
        self._since_s = since_s
        self._known: list[Any] | None = None

    def refresh(self) -> None:
        """Writes what is known now, where that has changed."""
        groups = self._groups()
        if groups != self._known:
            write_atomically(self.path, json.dumps(groups, indent=1) + "\n")
            self._known = groups

    def remove(self) -> None:
        """For a job that ended as it should: who is away on purpose is not missed."""
        self.path.unlink(missing_ok=True)

    def _groups(self) -> list[Any]:
        groups: list[Any] = []
        for path in sorted(self._metrics.glob("*.json")):
            try:
                if path.stat().st_mtime >= self._since_s:
                    groups += json.loads(path.read_text())
            except (FileNotFoundError, json.JSONDecodeError):
                continue  # its rank has just ended, or is writing it
        return groups


def targets_of(job: Job, task: str | None, since_s: float) -> Targets | None:
    """Of a job, or of the array's task of that number; none: the job has no folder for them."""
    if job.targets is None:
        return None
    run_dir, name = Path(job.run_dir), _stem(job)
    if task is not None:
        name = f"{name}-{task}"
        # Its ranks write into the folder that their command names, if it names one.
        run_dir = Path(job.directory, (run_dir_of(job.command) or job.run_dir).replace(TASK, task))
    return Targets(Path(job.targets, f"{name}.json"), run_dir / METRICS, since_s)


def remove_targets(job: Job) -> None:
    """Of all tasks of a job."""
    if job.targets is not None:
        for path in Path(job.targets).glob(f"{glob.escape(_stem(job))}*.json"):
            path.unlink(missing_ok=True)


def _stem(job: Job) -> str:
    # Runs of one name in several places do not meet.
    where = hashlib.sha256(job.run_dir.encode()).hexdigest()[:8]
    return f"{Path(job.run_dir).name}-{where}"
