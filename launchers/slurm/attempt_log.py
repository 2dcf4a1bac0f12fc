"""What the batch shells of a job write down: which nodes each attempt had, and how it ended.

One file a job, run_dir/launch/attempts/JOB.jsonl, a line when an attempt begins and one when it
ends. A shell can outlive its attempt, on a node whose daemon died: of two ends the first counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tvr.launchers.restart_policy import Ended

FOLDER = "attempts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of a job: SLURM's restart count, 0 for the first."""

    restart: int
    nodes: tuple[str, ...]
    began_s: float
    """Unix time."""
    ended: Ended | None
    """None: nobody has written it yet."""


class Attempts:
    """Those of one job."""

    def __init__(self, folder: Path, job_id: str) -> None:
        self._path = folder / FOLDER / f"{job_id}.jsonl"

    def read(self) -> list[Attempt]:
        """In the order of restarts."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        began: dict[int, Mapping[str, Any]] = {}
        ended: dict[int, Ended] = {}
        for text in lines:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # torn by a crash
            restart = line.pop("restart")
            if "nodes" in line:
                began.setdefault(restart, line)
            else:
                ended.setdefault(restart, Ended(**line))
        return [
            Attempt(
                restart=restart,
                nodes=tuple(line["nodes"]),
                began_s=line["began_s"],
                ended=ended.get(restart),
            )
            for restart, line in sorted(began.items())
        ]

    def begin(self, restart: int, nodes: list[str], began_s: float) -> None:
        self._append({"restart": restart, "nodes": nodes, "began_s": began_s})

    def end(self, restart: int, ended: Ended) -> None:
        self._append({"restart": restart, **asdict(ended)})

    def _append(self, line: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Not in the line that a crash has torn.
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as file:
            file.write("\n" * torn + json.dumps(line) + "\n")
