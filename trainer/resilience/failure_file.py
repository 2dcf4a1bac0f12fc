"""The file in which a job's first failing rank reports its failure to the other ranks.

Each job has one file, run_dir/failures/JOB.json. The rank that creates it reports the failure on
stderr and then writes the report into the file. The module imports no torch, so pages can read it.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "failures"
# A shared file system may show a file with a delay.
WAIT_S = 3.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The report of the first rank that failed."""

    rank: int
    host: str
    code: int
    """Exit code of all ranks."""
    error: str
    of: int | None
    """The rank at fault: the reporting rank, or one that all others waited for. None: unknown, or
    no rank in particular, so that no node may be excluded."""


@dataclass(frozen=True, slots=True)
class FailureFile:
    """One job's failure file, as used by one rank."""

    path: Path
    rank: int

    def claim(self) -> bool:
        """Creates the file.

        Returns:
            True if this rank should report: it created the file, or no rank can.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("x").close()
        except OSError:
            # If no file can be created, a cause reported twice is better than one never reported.
            return not self.path.exists()
        return True

    def record(self, error: str, code: int, *, of: int | None) -> None:
        """Writes a failure that this rank has reported on stderr.

        Args:
            of: The rank at fault, None if none is known.
        """
        host = socket.gethostname()
        failure = Failure(rank=self.rank, host=host, code=code, error=error, of=of)
        try:
            self.path.write_text(json.dumps(asdict(failure)) + "\n")
        except OSError:
            pass  # The disk may be the cause. The other ranks then report their own errors.

    def read(self) -> Failure | None:
        """The recorded failure; None if no rank has recorded one yet."""
        try:
            fields = json.loads(self.path.read_text())
            return Failure(**{"of": fields["rank"], **fields})  # older files have no `of`
        except (OSError, json.JSONDecodeError):
            return None

    def wait(self) -> Failure | None:
        """The recorded failure, waiting up to `WAIT_S` seconds for it."""
        deadline = time.monotonic() + WAIT_S
        while (failure := self.read()) is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return failure
