"""Log of a job's attempts: the nodes of each, and how it ended.

The batch shells write one file per job, run_dir/launch/attempts/JOB.jsonl, with one line when an
attempt begins and one when it ends. A shell can outlive its attempt if its node's daemon dies, so
the first recorded end of an attempt counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tvr.launchers.restart_policy import AttemptEnd

ATTEMPTS_DIR = "attempts"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobAttempt:
    """One attempt of a job."""

    restart: int
    """SLURM's restart count; 0 for the first attempt."""
    nodes: tuple[str, ...]
    began_s: float
    """Unix time."""
    end: AttemptEnd | None
    """None until an end is recorded."""


class AttemptLog:
    """Reads and appends to the log of one job."""

    def __init__(self, launch_dir: Path, job_id: str) -> None:
        self._path = launch_dir / ATTEMPTS_DIR / f"{job_id}.jsonl"

    def read(self) -> list[JobAttempt]:
        """Returns the attempts in the order of restarts."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        starts: dict[int, Mapping[str, Any]] = {}
        ends: dict[int, AttemptEnd] = {}
        for text in lines:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # incomplete: cut by a crash
            restart = line.pop("restart")
            if "nodes" in line:
                starts.setdefault(restart, line)
            else:
                ends.setdefault(restart, AttemptEnd(superseded=line.pop("over"), **line))
        return [
            JobAttempt(
                restart=restart,
                nodes=tuple(line["nodes"]),
                began_s=line["began_s"],
                end=ends.get(restart),
            )
            for restart, line in sorted(starts.items())
        ]

    def record_start(self, restart: int, nodes: list[str], began_s: float) -> None:
        self._append({"restart": restart, "nodes": nodes, "began_s": began_s})

    def record_end(self, restart: int, end: AttemptEnd) -> None:
        values = asdict(end)
        # The file's key for `superseded`.
        values["over"] = values.pop("superseded")
        self._append({"restart": restart, **values})

    def _append(self, line: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A crash may have left an incomplete last line.
        incomplete = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as file:
            file.write("\n" * incomplete + json.dumps(line) + "\n")
