"""How the failure of a job is told: once, in full, by the first rank that fails; the others say in
a line that they end because of it.

One file a job, run_dir/failures/JOB.json, is the word: the rank that creates it speaks, and fills
it in once it has spoken.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from tvr.launchers.exit_codes import EXIT_FAILED
from tvr.trainer.distributed.world import World, is_connection_error
from tvr.trainer.errors import AlreadyReported, Preempted, PreflightFailed

FOLDER = "failures"
# A rank that lost another one waits so long for the reason: a shared disk shows files late.
GRACE_S = 3.0
POLL_S = 0.05

Tell: TypeAlias = Callable[[Exception], int]
"""Says on stderr what went wrong, and returns the exit code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What the first rank to fail left for the others."""

    rank: int
    host: str
    code: int
    """Of the exit, for all ranks alike."""
    error: str
    of: int
    """The rank whose node may be to blame: this one, or one that all others waited for."""


@dataclass(frozen=True, slots=True)
class Failures:
    """The word of one job."""

    path: Path
    rank: int

    def take(self) -> bool:
        """Whether it is for this rank to speak: it is the first, or nobody can know who is."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("x").close()
        except OSError:
            # Where no file can be, a cause that is told twice is better than one that is not told.
            return not self.path.exists()
        return True

    def spoken(self, error: str, code: int, *, of: int | None = None) -> None:
        """To be called once the rank that took the word has spoken; default: `of` itself."""
        host, of = socket.gethostname(), self.rank if of is None else of
        failure = Failure(rank=self.rank, host=host, code=code, error=error, of=of)
        try:
            self.path.write_text(json.dumps(asdict(failure)) + "\n")
        except OSError:
            pass  # the disk may be what failed; the others then say what they saw

    def read(self) -> Failure | None:
        """What the rank that had the word left; none before it has spoken."""
        try:
            told = json.loads(self.path.read_text())
            return Failure(**{"of": told["rank"], **told})  # older ones do not say of whom
        except (OSError, json.JSONDecodeError):
            return None

    def wait(self) -> Failure | None:
        """The same, given a little time."""
        deadline = time.monotonic() + GRACE_S
        while (found := self.read()) is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return found


@contextmanager
def telling(run_dir: Path, world: World, tell: Tell | None) -> Iterator[Failures]:
    """Tells what ends the block on any rank once in the job; raises AlreadyReported on all ranks.

    Without `tell`, and on a rank that stands alone, errors pass as they are.
    """
    job = world.run_on_first(lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    failures = Failures(run_dir / FOLDER / f"{job}.json", world.rank)
    try:
        yield failures
    except Preempted:
        raise
    except Exception as error:
        if tell is None or world.world_size == 1:
            raise
        raise AlreadyReported(_told_once(failures, error, tell)) from None


def end_line(rank: int, failure: Failure) -> str:
    """What the others say."""
    return f"tvr train: rank {rank} ends: rank {failure.rank} on {failure.host} failed, see there"


def _told_once(failures: Failures, error: Exception, tell: Tell) -> int:
    lost = is_connection_error(error)
    # The rank whose node it is speaks, since the launcher blames the node of the one that does.
    other = isinstance(error, PreflightFailed) and error.rank not in (None, failures.rank)
    if not lost and not other and failures.take():
        code = tell(error)
        failures.spoken(f"{type(error).__name__}: {error}", code)
        return code
    found = failures.wait()
    if found is not None:
        print(end_line(failures.rank, found), file=sys.stderr)
        return found.code
    if not lost:
        return tell(error)
    said = " ".join(str(error).split()).split(". ")[0]
    print(
        f"tvr train: rank {failures.rank} ends: it lost another rank, which left no word ({said})",
        file=sys.stderr,
    )
    return EXIT_FAILED
