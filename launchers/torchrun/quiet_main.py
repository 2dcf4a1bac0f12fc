"""torchrun, quiet: how its ranks ended is written to a file, and a rank's own words are the last.

As it is it would print a log, its own traceback and a table below what a rank has said.
"""

from __future__ import annotations

import json
import logging
import runpy
import sys
from pathlib import Path

TORCHRUN = "torch.distributed.run"
EXIT_FAILED = 1


def run_agent(ended: Path, argv: list[str]) -> int:
    """Runs torchrun with `argv`; where ranks failed, `ended` gets their exit codes by rank, -9 for
    one that SIGKILL ended."""
    logging.disable(logging.ERROR)  # in this process alone; the ranks have their own
    sys.argv = [TORCHRUN, *argv]
    try:
        runpy.run_module(TORCHRUN, run_name="__main__", alter_sys=True)
    except Exception as error:
        # By name: the launcher imports the standard library only.
        match type(error).__name__:
            case "ChildFailedError":
                failures = getattr(error, "failures", {})
                codes = {rank: failure.exitcode for rank, failure in failures.items()}
                ended.write_text(json.dumps(codes))
            case "SignalException":
                pass  # the launcher passed it on, and knows
            case _:
                raise
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(run_agent(Path(sys.argv[1]), sys.argv[2:]))
