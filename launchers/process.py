"""Small helpers for processes: `PATH`, the death of a parent, and whether a process runs.

The module needs the standard library only, so every package may import it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Linux: the kernel signals a process when its parent dies, so a killed launcher leaves no ranks.
PR_SET_PDEATHSIG = 1
# Names a process's parent, from before the process was started.
PARENT_PID = "TVR_PARENT_PID"
POLL_S = 1.0


def path_with_scripts(path: str) -> str:
    """Returns `PATH` with this interpreter's script folder first, unless it is already listed."""
    scripts = sysconfig.get_path("scripts")
    folders = path.split(os.pathsep) if path else []
    return path if scripts in folders else os.pathsep.join([scripts, *folders])


def is_tvr_command(command: Sequence[str]) -> bool:
    """True for `tvr ...`, which a launcher runs with its own interpreter."""
    return command[0] == "tvr"


def die_with_parent(signal_number: int, parent: int | None = None) -> None:
    """Makes the kernel send this process a signal when its parent dies.

    The kernel looks at the thread that started this process, so that must be a thread that lives
    as long as the parent, such as its main thread.

    Args:
        signal_number: The signal.
        parent: Process id of the parent, known from before this process was started. A parent that
            died before this call then counts, too. None does not check.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number)
    # Checked after the request: between a check and a later request the parent could die unseen.
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal_number)


def child_set_up(signal_number: int) -> Callable[[], None]:
    """Returns a `preexec_fn` by which a child gets a signal when this process dies."""
    parent = os.getpid()
    return lambda: die_with_parent(signal_number, parent)


def end_with_parent(parent: int) -> None:
    """Ends this forked process with SIGKILL when its parent dies, or if it has died already.

    A process that waits in a read handles no other signal, and a worker has nothing to save.

    Args:
        parent: Process id of the parent, known from before this process was started.
    """
    # After a fork, the only thread of the child keeps the name of the thread that forked.
    if sys.platform == "linux" and threading.current_thread().name == "MainThread":
        die_with_parent(signal.SIGKILL, parent)
        return

    def poll() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=poll, name="parent", daemon=True).start()


def is_running(pid: int) -> bool:
    """True if the process exists and has not exited; a zombie is not running."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
