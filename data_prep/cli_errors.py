"""Error reporting shared by the command lines of all packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pydantic import ConfigDict

from tvr.data_prep.records import BadSample, ShardCorrupt, TooManyBadSamples
from tvr.data_prep.storage.storage_errors import StorageUnavailable
from tvr.launchers.exit_codes import EXIT_FAILED, EXIT_USAGE

STRICT = ConfigDict(extra="forbid", strict=True)
# Errors that a user's input can cause; any other exception is a bug and keeps its traceback.
# ImportError: fsspec names the package that a URL's file system needs.
USER_ERRORS = (ValueError, OSError, BadSample, TooManyBadSamples, ShardCorrupt, ImportError)


def run_command(command: str, action: Callable[[], int]) -> int:
    """Runs a command and returns its exit code.

    An error of USER_ERRORS becomes one line on stderr and exit code 2. A storage that fails for the
    moment gives 3: the same command may succeed later.

    Args:
        command: Name that starts the error line, such as "tvr pack".
    """
    try:
        return action()
    except StorageUnavailable as error:
        print_error(command, error)
        return EXIT_FAILED
    except USER_ERRORS as error:
        print_error(command, error)
        return EXIT_USAGE


def print_error(command: str, error: Exception) -> None:
    """Prints an error as one line on stderr, with the rank if the process has one."""
    rank = os.environ.get("RANK")
    where = "" if rank is None else f" [rank {rank}]"
    print(f"{command}: error{where}: {' '.join(str(error).split())}", file=sys.stderr)
