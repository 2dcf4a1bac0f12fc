"""Batch shell of a job: supervises srun on the first node, and decides about a restart.

It sets the rendezvous address, forwards the preemption notice to the ranks, records how the attempt
ended, and continues the job within its restart budget. If SLURM itself requeues the job after a
node failure, the next attempt's shell records how the previous one ended.

A question that SLURM does not answer never ends a job: the log names it, and the job goes on as if
nothing were wrong with its nodes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tvr.launchers.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from tvr.launchers.job import Job, read_job_record, task_run_dir
from tvr.launchers.monitoring.targets import targets_file
from tvr.launchers.restart_policy import (
    MAX_NODE_FAILURES,
    AttemptEnd,
    RestartDecision,
    decide_restart,
)
from tvr.launchers.run_status import is_superseded, mark_run, read_progress
from tvr.launchers.slurm import commands
from tvr.launchers.slurm.allocation import Allocation, read_allocation
from tvr.launchers.slurm.attempt_log import AttemptLog
from tvr.launchers.slurm.continuation import continue_job, earlier_ends
from tvr.launchers.slurm.step import SrunStep, log
from tvr.launchers.slurm.submission import is_cancelled

T = TypeVar("T")


def run_batch(record: Path, srun: Sequence[str]) -> int:
    """Runs one attempt of a job and returns its exit code.

    Args:
        record: Path of the job's record.
        srun: Command that starts the ranks.
    """
    try:
        return _run_batch(record, srun)
    except ValueError as error:
        # The record or the allocation cannot be read, or srun is missing: the same everywhere.
        log(str(error))
        return EXIT_FAILED


def _run_batch(record: Path, srun: Sequence[str]) -> int:
    job, allocation = read_job_record(record), read_allocation(os.environ)
    attempts = AttemptLog(job.launch_dir, allocation.job_id)
    decision = _decide_from_earlier(job, allocation, attempts)
    if decision and not decision.restart:
        return _apply(decision, job, allocation)
    began_s = time.time()
    # Recorded even if it ends at once: a job must not be requeued without limit.
    attempts.record_start(allocation.restart, list(allocation.nodes), began_s)
    unwanted: list[str] = []
    if decision:
        unwanted = sorted({*_excludable_nodes(decision, job, allocation)} & {*allocation.nodes})
    if unwanted:
        run_dir = task_run_dir(job, allocation.task)
        end = _preempted(run_dir, f"SLURM allocated the excluded node {', '.join(unwanted)}")
        attempts.record_end(allocation.restart, end)
        return _apply(_decide(attempts, job), job, allocation)
    run_dir = task_run_dir(job, allocation.task)
    targets, mark = targets_file(job, allocation.task), mark_run(run_dir)
    end = SrunStep(job, allocation, targets, mark).run(srun)
    try:
        if end.code == EXIT_FAILED and not _is_running_here(allocation):
            # SLURM ended the ranks to give their nodes to another job: not a failure.
            end = _unreported_end(allocation.nodes, began_s, run_dir)
        if end.code == EXIT_FAILED and is_superseded(run_dir, allocation.job_id, mark):
            end = replace(end, node=None, superseded=True)
    finally:
        attempts.record_end(allocation.restart, end)
    if targets and end.code in (EXIT_DONE, EXIT_PREEMPTED):
        targets.remove()
    return _apply(_decide(attempts, job), job, allocation)


def _decide_from_earlier(
    job: Job, allocation: Allocation, attempts: AttemptLog
) -> RestartDecision | None:
    """Records missing ends of earlier attempts, then decides; None for the first attempt."""
    for attempt in attempts.read():
        if attempt.end is None and attempt.restart < allocation.restart:
            run_dir = task_run_dir(job, allocation.task)
            end = _unreported_end(attempt.nodes, attempt.began_s, run_dir)
            attempts.record_end(attempt.restart, end)
    return _decide(attempts, job) if allocation.restart else None


def _unreported_end(nodes: Sequence[str], began_s: float, run_dir: Path) -> AttemptEnd:
    """Infers the end of an attempt that SLURM ended: a failed node, or a preemption."""
    node = _answer(lambda: commands.failed_node_since(nodes, began_s), "no node is blamed", None)
    if node is None:
        return _preempted(run_dir, "SLURM preempted the job")
    saved_step = read_progress(run_dir).saved_step
    return AttemptEnd(
        code=EXIT_FAILED, reason=f"node {node} failed", node=node, saved_step=saved_step
    )


def _preempted(run_dir: Path, reason: str) -> AttemptEnd:
    saved_step = read_progress(run_dir).saved_step
    return AttemptEnd(code=EXIT_PREEMPTED, reason=reason, node=None, saved_step=saved_step)


def _is_running_here(allocation: Allocation) -> bool:
    """True if SLURM still lists this attempt as running, or does not say."""
    state = _state(allocation)
    return state is None or (state.state, state.restarts) == ("RUNNING", allocation.restart)


def _state(allocation: Allocation) -> commands.JobState | None:
    return _answer(lambda: commands.job_state(allocation.full_id), "its state is unknown", None)


def _answer(ask: Callable[[], T], otherwise: str, default: T) -> T:
    """Asks SLURM; returns a default, and logs why, if it does not answer."""
    try:
        return ask()
    except ValueError as error:
        log(f"{error}; {otherwise}")
        return default


def _decide(attempts: AttemptLog, job: Job) -> RestartDecision | None:
    ends = [attempt.end for attempt in attempts.read() if attempt.end is not None]
    return decide_restart([*earlier_ends(job), *ends], job.policy) if ends else None


def _apply(decision: RestartDecision | None, job: Job, allocation: Allocation) -> int:
    """Continues the job if it restarts, and returns the attempt's exit code."""
    assert decision is not None, "at least one attempt has ended"
    if not decision.restart:
        log(decision.message)
        return decision.code
    state = _state(allocation)
    # A shell that outlived its node's daemon must not requeue the job, nor may one that ends
    # because the job is cancelled.
    if state and (state.state, state.restarts) != ("RUNNING", allocation.restart):
        log(f"job {allocation.full_id} is {state.state}: this attempt does not requeue it")
        return decision.code
    if is_cancelled(job.launch_dir, allocation.full_id):
        log("the job is cancelled: this attempt does not continue it")
        return decision.code
    excluded = _excludable_nodes(decision, job, allocation)
    failed = f"{', '.join(decision.exclude)}, which failed {MAX_NODE_FAILURES} times"
    if excluded:
        log(f"{decision.message} without {failed}")
    elif decision.exclude:
        log(
            f"{decision.message} on any node: partition {allocation.partition} has too few"
            f" without {failed}"
        )
    else:
        log(decision.message)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends it on a requeue
    return continue_job(job, allocation, decision, excluded, may_requeue=state is not None)


def _excludable_nodes(
    decision: RestartDecision, job: Job, allocation: Allocation
) -> tuple[str, ...]:
    """Nodes to exclude; empty if the partition would have too few usable nodes left.

    The job would otherwise stay pending forever.
    """
    if not decision.exclude:
        return ()
    partition, none = allocation.partition, set[str]()
    listed = _answer(lambda: commands.usable_nodes(partition), "no node is excluded", none)
    usable = listed - {*job.exclude, *decision.exclude}
    return decision.exclude if len(usable) >= job.nodes else ()


if __name__ == "__main__":
    sys.exit(run_batch(Path(sys.argv[1]), sys.argv[2:]))
