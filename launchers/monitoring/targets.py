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
from tvr.launchers.job import Job, task_run_dir
from tvr.launchers.run_status import FileState, file_states

METRICS_DIR = "metrics"


class TargetsFile:
    """Merged target file of one run, or of one array task."""

    def __init__(self, path: Path, metrics: Path) -> None:
        """Creates no file yet. Call it before the ranks start.

        Args:
            path: The merged file.
            metrics: Folder of the nodes' files. Those that it holds now belong to an earlier
                attempt, until they change.
        """
        self.path = path
        self._metrics = metrics
        self._earlier = file_states(metrics)
        self._known: dict[str, tuple[FileState, list[Any]]] = {}
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
        """The endpoints of all nodes; reads only files that have changed since the last call."""
        known: dict[str, tuple[FileState, list[Any]]] = {}
        for name, state in sorted(file_states(self._metrics).items()):
            if self._earlier.get(name) == state:
                continue
            if name in self._known and self._known[name][0] == state:
                known[name] = self._known[name]
                continue
            try:
                known[name] = state, json.loads((self._metrics / name).read_text())
            except (FileNotFoundError, json.JSONDecodeError):
                continue  # its rank has just exited, or is writing it
        self._known = known
        return [group for _, groups in known.values() for group in groups]


def targets_file(job: Job, task: str | None) -> TargetsFile | None:
    """Returns the target file of a job, or None if the job has no targets folder.

    Args:
        job: The job.
        task: Number of the array task; None without an array.
    """
    if job.targets is None:
        return None
    name = _stem(job) if task is None else f"{_stem(job)}-{task}"
    metrics = task_run_dir(job, task) / METRICS_DIR
    return TargetsFile(Path(job.targets, f"{name}.json"), metrics)


def remove_targets(job: Job) -> None:
    """Removes the target files of a job and of all its array tasks."""
    if job.targets is not None:
        for path in Path(job.targets).glob(f"{glob.escape(_stem(job))}*.json"):
            path.unlink(missing_ok=True)


def _stem(job: Job) -> str:
    # The hash separates run folders of the same name.
    digest = hashlib.sha256(job.run_dir.encode()).hexdigest()[:8]
    return f"{Path(job.run_dir).name}-{digest}"
