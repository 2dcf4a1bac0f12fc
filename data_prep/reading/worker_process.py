"""Preparation of a forked loader worker: garbage, signals, and its end with its rank."""

from __future__ import annotations

import gc
import os
import signal
import threading
from multiprocessing import parent_process

from tvr.launchers.process import end_with_parent


def start_worker(worker: int) -> None:
    """Prepares a worker; torch's DataLoader calls it first in each.

    torch ends an orphaned worker only between two batches: one that waits in a read of a dead file
    server, or for a store, would stay on the node and hold its memory.
    """
    del worker  # its number is the same on all ranks
    # From before the fork: `os.getppid` would name the process that adopted an orphan.
    parent = parent_process()
    rank = os.getppid() if parent is None or parent.pid is None else parent.pid
    # First: threads that start later must not take the signal either.
    _exit_on_sigterm_of_parent(rank)
    end_with_parent(rank)
    # The rank may run the garbage collector on a schedule of steps, which a worker does not see.
    gc.enable()


def _exit_on_sigterm_of_parent(rank: int) -> None:
    """Makes a worker exit on SIGTERM only if its own rank sent the signal.

    Batch systems send SIGTERM to every process of a job, and the ranks need their workers to finish
    the step. Without this function, torch's signal handler ends the worker.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, name="sigterm", daemon=True).start()
