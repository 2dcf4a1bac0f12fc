"""Starts a job again that this machine started, within its budget."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tvr.launchers.exit_codes import EXIT_DONE, EXIT_PREEMPTED
from tvr.launchers.restart_policy import Ended, Policy, decide
from tvr.launchers.run_status import read_progress, told_failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How one start of a job ended."""

    code: int
    told: bool
    """Whether the launcher was told to end it."""


def run_again(start: Callable[[], Ending], policy: Policy, run_dir: Path | None) -> int:
    """Starts the job until it is done, is to end, or has spent its budget; its exit code.

    `run_dir` tells what was saved and what went wrong; none: the command has no such folder.
    """
    ends: list[Ended] = []
    while True:
        began_s = time.time()
        ending = start()
        # Whoever told it to leave its place starts it again elsewhere.
        if ending.told or ending.code in (EXIT_DONE, EXIT_PREEMPTED):
            return ending.code
        ends.append(_ended(ending.code, run_dir, began_s))
        decision = decide(ends, policy)
        if policy.max_failures > 1:
            print(f"tvr launch: {decision.text}", file=sys.stderr, flush=True)
        if not decision.again:
            return decision.code
        time.sleep(decision.wait_s)


def _ended(code: int, run_dir: Path | None, began_s: float) -> Ended:
    told = told_failure(run_dir, began_s) if run_dir else None
    return Ended(
        code=code,
        reason=told.reason if told else f"it failed with exit code {code}",
        node=None,
        saved_step=read_progress(run_dir).saved_step if run_dir else 0,
    )
