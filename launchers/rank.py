"""What torchrun starts on each rank: `tvr`, with its exit code written down for the launcher."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from tvr.launchers.cli import EXIT_FAILED, main
from tvr.launchers.local import die_with_parent
from tvr.launchers.records import note


def run_rank(records: Path, argv: list[str]) -> int:
    """Runs `tvr ARGV`; adds to `records` that it began and how it ended, and returns its code."""
    die_with_parent(signal.SIGKILL)
    rank, pid = int(os.environ.get("RANK", "0")), os.getpid()
    note(records, rank, pid)
    try:
        code = main(argv)
    except SystemExit as end:
        code = _code_of(end)
    note(records, rank, pid, code)
    return code


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
