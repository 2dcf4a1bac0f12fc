"""Small helpers for processes: `PATH`, the death of a parent, and whether a process runs."""

from __future__ import annotations

import ctypes
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

# Linux: the kernel signals a process when its parent dies, so a killed launcher leaves no ranks.
PR_SET_PDEATHSIG = 1


def path_with_scripts(path: str) -> str:
    """Returns `PATH` with this interpreter's script folder first, unless it is already listed."""
    scripts = sysconfig.get_path("scripts")
    folders = path.split(os.pathsep) if path else []
    return path if scripts in folders else os.pathsep.join([scripts, *folders])


def is_tvr_command(command: Sequence[str]) -> bool:
    """True for `tvr ...`, which a launcher runs with its own interpreter."""
    return command[0] == "tvr"


def die_with_parent(signal_number: int) -> None:
    """Makes the kernel send this process a signal when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number)


def is_running(pid: int) -> bool:
    """True if the process exists and has not exited; a zombie is not running."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
