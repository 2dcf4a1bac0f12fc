"""Restarts a job that this process launched directly (local ranks, ssh), within its budget."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tvr.launchers.exit_codes import EXIT_DONE, EXIT_PREEMPTED
from tvr.launchers.restart_policy import AttemptEnd, RestartPolicy, decide_restart
from tvr.launchers.run_status import RunMark, mark_run, read_progress, reported_failure


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchExit:
    """How one launch of a job ended."""

    code: int
    signalled: bool
    """True if the launcher received SIGINT or SIGTERM."""


def run_with_restarts(
    launch_once: Callable[[], LaunchExit], policy: RestartPolicy, run_dir: Path | None
) -> int:
    """Launches a job until it finishes, is interrupted or preempted, or exhausts its budget.

    Args:
        launch_once: Runs the job once and waits for it.
        policy: Restart budget.
        run_dir: Run folder, read for checkpoints and failure reports. None if the command has no
            run folder: every failure then counts as one without a new checkpoint.

    Returns:
        The job's exit code.
    """
    ends: list[AttemptEnd] = []
    while True:
        # Marked by what the folder holds: the clock of a file server may differ.
        mark = mark_run(run_dir) if run_dir else None
        last = launch_once()
        # A preempted job is restarted elsewhere, by whoever interrupted it.
        if last.signalled or last.code in (EXIT_DONE, EXIT_PREEMPTED):
            return last.code
        ends.append(_attempt_end(last.code, run_dir, mark))
        decision = decide_restart(ends, policy)
        if policy.max_failures > 1:
            print(f"tvr launch: {decision.message}", file=sys.stderr, flush=True)
        if not decision.restart:
            return decision.code
        time.sleep(decision.wait_s)


def _attempt_end(code: int, run_dir: Path | None, mark: RunMark | None) -> AttemptEnd:
    failure = reported_failure(run_dir, mark) if run_dir and mark else None
    return AttemptEnd(
        code=code,
        reason=failure.reason if failure else f"job failed with exit code {code}",
        node=None,
        saved_step=read_progress(run_dir).saved_step if run_dir else 0,
    )
