"""Runs torchrun without its own output, and writes the ranks' exit codes to a file.

torchrun would print a log, its own traceback and a table below the output of a failed rank.
"""

from __future__ import annotations

import json
import logging
import os
import runpy
import sys
from pathlib import Path

from tvr.launchers.process import PARENT_PID

TORCHRUN = "torch.distributed.run"
TORCHRUN_FAILED = 1


def run_torchrun(exit_codes: Path, argv: list[str]) -> int:
    """Runs torchrun with `argv` and returns its exit code.

    If ranks fail, writes their exit codes by rank to `exit_codes`; -9 is a rank that SIGKILL ended.
    """
    logging.disable(logging.ERROR)  # affects this process only, not the ranks
    sys.argv = [TORCHRUN, *argv]
    os.environ[PARENT_PID] = str(os.getpid())  # torchrun starts the ranks from this process
    try:
        runpy.run_module(TORCHRUN, run_name="__main__", alter_sys=True)
    except Exception as error:
        # Matched by name: the launcher imports the standard library only.
        match type(error).__name__:
            case "ChildFailedError":
                failures = getattr(error, "failures", {})
                codes = {rank: failure.exitcode for rank, failure in failures.items()}
                exit_codes.write_text(json.dumps(codes))
            case "SignalException":
                pass  # the launcher forwarded this signal
            case _:
                raise
        return TORCHRUN_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(run_torchrun(Path(sys.argv[1]), sys.argv[2:]))
