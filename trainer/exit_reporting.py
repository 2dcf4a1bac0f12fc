"""How a training command ends: the line on stderr and the exit code.

Launchers decide by the exit code whether they start the command again.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from tvr.data_prep.cli_errors import print_error, run_command
from tvr.data_prep.records import TooManyBadSamples
from tvr.launchers.exit_codes import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE
from tvr.trainer.errors import (
    AlreadyReported,
    CheckpointDamaged,
    Fenced,
    NonFiniteLoss,
    NotSaved,
    Preempted,
    PreflightFailed,
)


def run_training_command(command: str, action: Callable[[], int]) -> int:
    """Runs a command of the trainer, reports its errors on stderr, and returns the exit code.

    Errors that have a known cause become one line. Any other exception is a bug and passes through.
    """

    def guarded() -> int:
        try:
            return action()
        except Preempted as notice:
            print(f"tvr {command}: {notice}", file=sys.stderr)
            return EXIT_PREEMPTED
        except AlreadyReported as failure:
            return failure.code
        except PreflightFailed as failed:
            for line in failed.lines:
                print_error(f"tvr {command}", ValueError(line))
            return EXIT_USAGE if failed.rank is None else EXIT_FAILED
        except (NonFiniteLoss, NotSaved, TooManyBadSamples, CheckpointDamaged, Fenced) as error:
            print_error(f"tvr {command}", error)
            return EXIT_FAILED

    return run_command(f"tvr {command}", guarded)


def report_training_error(error: Exception) -> int:
    """Writes an error of `tvr train` to stderr, a bug with its traceback; returns the exit code."""

    def reraise() -> int:
        raise error

    try:
        return run_training_command("train", reraise)
    except Exception:
        traceback.print_exception(error)
        return EXIT_FAILED
