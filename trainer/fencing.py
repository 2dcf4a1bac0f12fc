"""Fencing: only a run's newest attempt may write to it.

A rank can outlive its job, for example if its node's daemon dies. The job is then restarted while
the orphaned rank still holds the weights and an open run. Each attempt takes the next number when
it starts, and checks before every write that its number is still the newest. A delayed start of a
SLURM job takes no number if a later restart of the same job has already begun.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvr.trainer.errors import Fenced

ATTEMPTS = "attempts"


@dataclass(frozen=True, slots=True)
class Attempt:
    """A start of the run; the first one has number 1."""

    run_dir: Path
    number: int

    def run_began_s(self) -> float:
        """Unix time at which the run's first attempt began."""
        path = _file(self.run_dir, 1)
        try:
            return json.loads(path.read_text())["began_s"]
        except (json.JSONDecodeError, KeyError):
            return path.stat().st_mtime  # older files lack the field

    def check(self) -> None:
        """Raises Fenced if a newer attempt has begun."""
        newer = _file(self.run_dir, self.number + 1)
        if newer.exists():
            raise Fenced(
                f"attempt {self.number} at {self.run_dir} is over: a newer attempt has begun"
                f" ({newer.read_text().strip() or newer.name}); this process writes nothing more"
            )


def begin_attempt(run_dir: Path) -> Attempt:
    """Takes the next number; rank 0 calls it. Jobs that start at the same time get two numbers.

    Raises:
        Fenced: a later restart of the same SLURM job has already begun.
    """
    folder = run_dir / ATTEMPTS
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(path.stem) for path in folder.glob("*.json")), default=0) + 1
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began_s": time.time(),
        **_slurm_job(),
    }
    while True:
        _raise_if_delayed(run_dir, number - 1, record)
        try:
            with _file(run_dir, number).open("x") as file:
                file.write(json.dumps(record) + "\n")
            return Attempt(run_dir, number)
        except FileExistsError:
            number += 1


def _slurm_job() -> dict[str, str | int]:
    """Job id and restart count of this start; empty outside SLURM."""
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return {"job": os.environ["SLURM_JOB_ID"], "restart": restart}


def _raise_if_delayed(run_dir: Path, newest: int, record: Mapping[str, Any]) -> None:
    """Raises Fenced if the newest attempt belongs to a later restart of this job."""
    path = _file(run_dir, newest)
    if "restart" not in record or not path.exists():
        return
    try:
        other = json.loads(path.read_text())
    except json.JSONDecodeError:
        return  # the other attempt is just writing it
    if other.get("job") == record["job"] and other["restart"] > record["restart"]:
        raise Fenced(
            f"restart {record['restart']} of job {record['job']} starts too late at {run_dir}:"
            f" restart {other['restart']} has already begun"
        )


def _file(run_dir: Path, number: int) -> Path:
    return run_dir / ATTEMPTS / f"{number:06d}.json"
