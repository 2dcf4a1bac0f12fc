"""Entry point of each rank: runs `tvr` and, under torchrun, records the rank's exit code."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tvr.launchers.cli import main
from tvr.launchers.exit_codes import EXIT_FAILED, EXIT_PREEMPTED
from tvr.launchers.process import PARENT_PID, die_with_parent
from tvr.launchers.torchrun.rank_exits import record_rank

# Signals by which a batch system announces a preemption.
NOTICE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


def run_rank(records: Path, argv: list[str]) -> int:
    """Runs `tvr ARGV`, records its start and its end in `records`, and returns its exit code."""
    rank, pid = int(os.environ.get("RANK", "0")), os.getpid()
    record_rank(records, rank, pid)
    code = run_tvr(argv)
    record_rank(records, rank, pid, code)
    return code


def run_tvr(argv: Sequence[str]) -> int:
    """Runs `tvr ARGV` in this process, which dies with its parent, and returns its exit code.

    A preemption notice that arrives before the command installs its own handlers ends the process
    at once: there is nothing to save yet.
    """
    # Removed: it does not hold for processes that this one starts.
    parent = os.environ.pop(PARENT_PID, None)
    die_with_parent(signal.SIGKILL, int(parent) if parent else None)
    exit_on_notice()
    try:
        return main(argv)
    except SystemExit as end:
        return _exit_code(end)


def exit_on_notice() -> None:
    """Exits with `EXIT_PREEMPTED` on a preemption notice."""
    for number in NOTICE_SIGNALS:
        signal.signal(number, lambda received, frame: sys.exit(EXIT_PREEMPTED))


def end_process(code: int) -> NoReturn:
    """Exits like `sys.exit`, but without finalizing the interpreter.

    A gloo thread may still release the tensors of the last collective, which needs the GIL. If
    that happens during finalization, the process aborts (torch 2.13), and a rank that had finished
    its work would count as failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _exit_code(end: SystemExit) -> int:
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code
    print(end.code, file=sys.stderr)
    return EXIT_FAILED


if __name__ == "__main__":
    end_process(run_rank(Path(sys.argv[1]), sys.argv[2:]))
