"""How a command that trains ends: what is told of an error, and the exit code for whoever starts it
again or does not."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from tvr.data_prep.cli_errors import reported, say_error
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
    """As `reported`, and a training that failed for a reason it can name becomes exit code 3."""

    def guarded() -> int:
        try:
            return action()
        except Preempted as notice:
            print(f"tvr {command}: {notice}", file=sys.stderr)
            return EXIT_PREEMPTED
        except AlreadyReported as told:
            return told.code
        except PreflightFailed as failed:
            for line in failed.lines:
                say_error(f"tvr {command}", ValueError(line))
            return EXIT_USAGE if failed.rank is None else EXIT_FAILED
        except (NonFiniteLoss, NotSaved, TooManyBadSamples, CheckpointDamaged, Fenced) as error:
            say_error(f"tvr {command}", error)
            return EXIT_FAILED

    return reported(f"tvr {command}", guarded)


def report_training_error(error: Exception) -> int:
    """What `tvr train` says of an error, from where it happens; the exit code."""

    def again() -> int:
        raise error

    try:
        return run_training_command("train", again)
    except Exception:
        traceback.print_exception(error)
        return EXIT_FAILED
