"""What the ranks of a job write down for their launcher: a line as one begins, another as it ends.

torchrun ends with 1 whatever its ranks returned, and its log is no interface.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """One rank."""

    rank: int
    pid: int
    code: int | None
    """None: it has not come to its end, or was stopped short of it."""


def note(records: Path, rank: int, pid: int, code: int | None = None) -> None:
    """Adds this rank's line: that it began, or with which code it ended."""
    # One short write to a file opened for appending: lines of several ranks do not mix.
    file = os.open(records, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(file, f"{rank} {pid} {'-' if code is None else code}\n".encode())
    finally:
        os.close(file)


def read(records: Path) -> list[RankRecord]:
    """The ranks that began, those without an end first, the others in the order of their ends."""
    lines = records.read_text().splitlines() if records.exists() else []
    found: dict[int, RankRecord] = {}
    for rank, pid, code in (line.split() for line in lines):
        found.pop(int(rank), None)
        number = None if code == "-" else int(code)
        found[int(rank)] = RankRecord(rank=int(rank), pid=int(pid), code=number)
    return sorted(found.values(), key=lambda record: record.code is not None)


def has_failed(record: RankRecord) -> bool:
    """Whether a rank ended otherwise than well, or is gone without a word."""
    return not is_alive(record.pid) if record.code is None else record.code != 0


def is_alive(pid: int) -> bool:
    """Whether a process is there; one that has ended and is not waited for yet is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
