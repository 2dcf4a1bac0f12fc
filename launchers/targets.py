"""Where Prometheus finds the hosts of a job: one file in a folder that its file_sd reads.

The ranks of each node say where they can be asked in run_dir/metrics/*.json, lists of groups as
file_sd has them: `[{"targets": ["host:port"], "labels": {...}}]`. The launcher joins those of this
attempt into one file, beside those of other runs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tvr.launchers.job import write_whole

METRICS = "metrics"


class Targets:
    """The file of one run."""

    def __init__(self, folder: Path, run_dir: Path, since_s: float) -> None:
        """Of what was written after `since_s` (Unix time): before that it was another attempt."""
        # Runs of one name in several places do not meet.
        where = hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]
        self.path = folder / f"{run_dir.name}-{where}.json"
        self._metrics = run_dir / METRICS
        self._since_s = since_s
        self._known: list[Any] | None = None

    def refresh(self) -> None:
        """Writes what is known now, where that has changed."""
        groups = self._groups()
        if groups != self._known:
            write_whole(self.path, json.dumps(groups, indent=1) + "\n")
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
