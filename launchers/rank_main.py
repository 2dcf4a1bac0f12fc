"""What runs on each rank: `tvr`; under torchrun its exit code is written down."""

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
from tvr.launchers.torchrun.launch import die_with_parent
from tvr.launchers.torchrun.rank_exits import note

# The notice that a batch system gives before it takes a job off its nodes.
NOTICES = (signal.SIGUSR1, signal.SIGUSR2)


def run_rank(records: Path, argv: list[str]) -> int:
    """Runs `tvr ARGV`; adds to `records` that it began and how it ended, and returns its code."""
    rank, pid = int(os.environ.get("RANK", "0")), os.getpid()
    note(records, rank, pid)
    code = run_tvr(argv)
    note(records, rank, pid, code)
    return code


def run_tvr(argv: Sequence[str]) -> int:
    """Runs `tvr ARGV` in this process, which ends with its parent; returns its exit code.

    Told to leave before the command listens by itself, it leaves at once: nothing is lost yet.
    """
    die_with_parent(signal.SIGKILL)
    leave_when_told()
    try:
        return main(argv)
    except SystemExit as end:
        return _code_of(end)


def leave_when_told() -> None:
    """Lets a notice end the process, with the code that says that it may be started again."""
    for number in NOTICES:
        signal.signal(number, lambda got, frame: sys.exit(EXIT_PREEMPTED))


def end_process(code: int) -> NoReturn:
    """Ends the process as `sys.exit` would, but for the interpreter's own taking down.

    A thread of gloo may still be releasing the tensors of the last collective, for which it takes
    the interpreter's lock; where that happens while the interpreter is being taken down, the whole
    process aborts (torch 2.13), and a rank that had done everything has failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _code_of(end: SystemExit) -> int:
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code
    print(end.code, file=sys.stderr)
    return EXIT_FAILED


if __name__ == "__main__":
    end_process(run_rank(Path(sys.argv[1]), sys.argv[2:]))
