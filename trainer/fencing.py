"""The fencing token: of all attempts at a run only the newest may write to it.

A rank can outlive its job, for example behind a node daemon that died; the job is then restarted
while the orphan still holds weights and an open run. Each attempt takes the next number when it
starts, and every write to the run asks first whether the number is still the newest. A start that
SLURM's restart count shows to be an earlier one of the same job, only slower, takes none.
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
    """The number of this start of the run, 1 for the first."""

    run_dir: Path
    number: int

    def run_began_s(self) -> float:
        """When the run's first attempt began, in Unix time."""
        path = _file(self.run_dir, 1)
        try:
            return json.loads(path.read_text())["began_s"]
        except (json.JSONDecodeError, KeyError):
            return path.stat().st_mtime  # written before it was told; a copied folder loses it

    def check(self) -> None:
        """Raises Fenced once a newer attempt has begun."""
        newer = _file(self.run_dir, self.number + 1)
        if newer.exists():
            raise Fenced(
                f"attempt {self.number} at {self.run_dir} is over: another one began"
                f" ({newer.read_text().strip() or newer.name}); nothing more is written by this one"
            )


def begin_attempt(run_dir: Path) -> Attempt:
    """Takes the next number; rank 0 of a job calls it. Two jobs at once get two numbers.

    Raises:
        Fenced: a later restart of this very job of SLURM has begun already.
    """
    folder = run_dir / ATTEMPTS
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(path.stem) for path in folder.glob("*.json")), default=0) + 1
    who = {"host": socket.gethostname(), "pid": os.getpid(), "began_s": time.time(), **_of_slurm()}
    while True:
        _refuse_late(run_dir, number - 1, who)
        try:
            with _file(run_dir, number).open("x") as file:
                file.write(json.dumps(who) + "\n")
            return Attempt(run_dir, number)
        except FileExistsError:
            number += 1


def _of_slurm() -> dict[str, str | int]:
    """Which start of which job this is, where SLURM started it."""
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return {"job": os.environ["SLURM_JOB_ID"], "restart": restart}


def _refuse_late(run_dir: Path, newest: int, who: Mapping[str, Any]) -> None:
    path = _file(run_dir, newest)
    if "restart" not in who or not path.exists():
        return
    try:
        other = json.loads(path.read_text())
    except json.JSONDecodeError:
        return  # it has begun in this moment
    if other.get("job") == who["job"] and other["restart"] > who["restart"]:
        raise Fenced(
            f"restart {who['restart']} of job {who['job']} is over before it began at {run_dir}:"
            f" restart {other['restart']} has begun"
        )


def _file(run_dir: Path, number: int) -> Path:
    return run_dir / ATTEMPTS / f"{number:06d}.json"
