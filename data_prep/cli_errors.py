"""Error reporting shared by the command lines of all packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pydantic import ConfigDict

from tvr.data_prep.records import BadSample, ShardCorrupt, TooManyBadSamples
from tvr.launchers.exit_codes import EXIT_USAGE

STRICT = ConfigDict(extra="forbid", strict=True)
# What a user's input can cause; anything else is a bug and keeps its traceback. ImportError: a URL
# whose file system needs an extra package, which fsspec names.
USER_ERRORS = (ValueError, OSError, BadSample, TooManyBadSamples, ShardCorrupt, ImportError)


def run_command(command: str, action: Callable[[], int]) -> int:
    """Runs a command; what its user caused becomes one line on stderr and exit code 2."""
    try:
        return action()
    except USER_ERRORS as error:
        print_error(command, error)
        return EXIT_USAGE


def print_error(command: str, error: Exception) -> None:
    """One line on stderr; ranks of a job say which they are."""
    rank = os.environ.get("RANK")
    where = "" if rank is None else f" [rank {rank}]"
    print(f"{command}: error{where}: {' '.join(str(error).split())}", file=sys.stderr)
