"""Target files for Prometheus's file_sd: the metrics endpoints of each running job.

The ranks of each node write their endpoints to run_dir/metrics/*.json, in file_sd's form:
`[{"targets": ["host:port"], "labels": {...}}]`. The launcher merges those of the current attempt
into one file per run, or per array task, in a folder that all runs share.
"""

from __future__ import annotations

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

from tvr.launchers.atomic_write import write_atomically
from tvr.launchers.job import TASK_ID, Job, command_run_dir

METRICS_DIR = "metrics"


class TargetsFile:
    """Merged target file of one run, or of one array task."""

    def __init__(self, path: Path, metrics: Path, since_s: float) -> None:
        """Creates no file yet.

        Args:
            path: The merged file.
            metrics: Folder of the nodes' files.
            since_s: Unix time; older files in `metrics` belong to an earlier attempt.
        """
        self.path = path
        self._metrics = metrics
        self._since_s = since_s
        self._written: list[Any] | None = None

    def refresh(self) -> None:
        """Writes the file if the endpoints have changed."""
        groups = self._read_groups()
        if groups != self._written:
            write_atomically(self.path, json.dumps(groups, indent=1) + "\n")
            self._written = groups

    def remove(self) -> None:
        """Removes the file after a normal exit, so that no alert fires."""
        self.path.unlink(missing_ok=True)

    def _read_groups(self) -> list[Any]:
        groups: list[Any] = []
        for path in sorted(self._metrics.glob("*.json")):
            try:
                if path.stat().st_mtime >= self._since_s:
                    groups += json.loads(path.read_text())
            except (FileNotFoundError, json.JSONDecodeError):
                continue  # its rank has just exited, or is writing it
        return groups


def targets_file(job: Job, task: str | None, since_s: float) -> TargetsFile | None:
    """Returns the target file of a job, or None if the job has no targets folder.

    Args:
        job: The job.
        task: Number of the array task; None without an array.
        since_s: Unix time at which the attempt began.
    """
    if job.targets is None:
        return None
    run_dir, name = Path(job.run_dir), _stem(job)
    if task is not None:
        name = f"{name}-{task}"
        # The ranks write to the run folder of their own command, if it has one.
        task_run_dir = command_run_dir(job.command) or job.run_dir
        run_dir = Path(job.directory, task_run_dir.replace(TASK_ID, task))
    return TargetsFile(Path(job.targets, f"{name}.json"), run_dir / METRICS_DIR, since_s)


def remove_targets(job: Job) -> None:
    """Removes the target files of a job and of all its array tasks."""
    if job.targets is not None:
        for path in Path(job.targets).glob(f"{glob.escape(_stem(job))}*.json"):
            path.unlink(missing_ok=True)


def _stem(job: Job) -> str:
    # The hash separates run folders of the same name.
    digest = hashlib.sha256(job.run_dir.encode()).hexdigest()[:8]
    return f"{Path(job.run_dir).name}-{digest}"
