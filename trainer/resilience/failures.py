"""Reports the failure of a job once.

The first rank that fails reports its error in full. Every other rank prints one line that names the
reporting rank, and exits with the same code.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from tvr.data_prep.records import TooManyBadSamples
from tvr.launchers.exit_codes import EXIT_FAILED
from tvr.trainer.distributed.world import World, is_connection_error
from tvr.trainer.errors import (
    AlreadyReported,
    Fenced,
    NonFiniteLoss,
    NotSaved,
    Preempted,
    PreflightFailed,
)
from tvr.trainer.resilience.failure_file import FOLDER, Failure, FailureFile

# The rank that reports one of them first is no more at fault than any other.
RAISED_ON_ALL_RANKS = (Fenced, NonFiniteLoss, NotSaved, TooManyBadSamples)

ErrorReporter: TypeAlias = Callable[[Exception], int]
"""Prints an error to stderr and returns the exit code."""


@contextmanager
def reporting_failures(
    run_dir: Path, world: World, report_error: ErrorReporter | None
) -> Iterator[FailureFile]:
    """Reports an error of the block on one rank of the job, and raises AlreadyReported on all.

    All ranks call it. Preempted always passes unchanged.

    Args:
        report_error: None: errors pass unchanged, as they do in a job of one rank.
    """
    job = world.run_on_first(lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    failures = FailureFile(run_dir / FOLDER / f"{job}.json", world.rank)
    try:
        yield failures
    except Preempted:
        raise
    except Exception as error:
        if report_error is None or world.world_size == 1:
            raise
        raise AlreadyReported(_report_once(failures, error, report_error)) from None


def peer_failure_line(rank: int, failure: Failure) -> str:
    """The line that a rank prints when it exits because of another rank's failure."""
    return (
        f"tvr train: rank {rank} exits because rank {failure.rank} on {failure.host} failed; see"
        " the error of that rank"
    )


def _report_once(failures: FailureFile, error: Exception, report_error: ErrorReporter) -> int:
    """Reports the error if this rank is the first to fail. Returns the exit code."""
    lost = is_connection_error(error)
    # The rank at fault reports, since the launcher blames the node of the reporting rank.
    other = isinstance(error, PreflightFailed) and error.rank not in (None, failures.rank)
    if not lost and not other and failures.claim():
        code = report_error(error)
        of = None if isinstance(error, RAISED_ON_ALL_RANKS) else failures.rank
        failures.record(f"{type(error).__name__}: {error}", code, of=of)
        return code
    failure = failures.wait()
    if failure is not None:
        print(peer_failure_line(failures.rank, failure), file=sys.stderr)
        return failure.code
    if not lost:
        return report_error(error)
    reason = " ".join(str(error).split()).split(". ")[0]
    print(
        f"tvr train: rank {failures.rank} exits because it lost another rank, which reported no"
        f" error ({reason})",
        file=sys.stderr,
    )
    return EXIT_FAILED
