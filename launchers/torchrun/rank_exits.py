"""Start and exit records that ranks write for their launcher, one line each.

torchrun exits with 1 whatever its ranks return, and the format of its log is not stable.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tvr.launchers.process import is_running


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """State of one rank."""

    rank: int
    pid: int
    code: int | None
    """Exit code; None if the rank is running or was killed."""


def record_rank(records: Path, rank: int, pid: int, code: int | None = None) -> None:
    """Appends a line that the rank has started, or that it exits with `code`."""
    # One short O_APPEND write: lines of several ranks do not interleave.
    file = os.open(records, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(file, f"{rank} {pid} {'-' if code is None else code}\n".encode())
    finally:
        os.close(file)


def read_ranks(records: Path) -> list[RankRecord]:
    """Reads all started ranks: those without an exit code first, the others in order of exit."""
    lines = records.read_text().splitlines() if records.exists() else []
    ranks: dict[int, RankRecord] = {}
    for rank, pid, code in (line.split() for line in lines):
        ranks.pop(int(rank), None)
        number = None if code == "-" else int(code)
        ranks[int(rank)] = RankRecord(rank=int(rank), pid=int(pid), code=number)
    return sorted(ranks.values(), key=lambda record: record.code is not None)


def has_failed(record: RankRecord) -> bool:
    """True if the rank exited with a code other than 0, or died without recording one."""
    return not is_running(record.pid) if record.code is None else record.code != 0
