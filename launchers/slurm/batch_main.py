"""The batch shell's part of a job: it stays beside srun on the first node, and decides at the end.

It tells ranks where they meet, passes the notice to leave on to them, writes down how the attempt
ended, and queues the job again where its budget allows that. Where the system itself queued it
again, since a node failed, the next attempt writes down what it sees of the one before.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tvr.launchers.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from tvr.launchers.job import Job, read_record
from tvr.launchers.monitoring.targets import targets_of
from tvr.launchers.restart_policy import NODE_FAILURES, Decision, Ended, decide
from tvr.launchers.run_status import read_progress, taken_over
from tvr.launchers.slurm import commands as slurm
from tvr.launchers.slurm.allocation import Allocation, allocation
from tvr.launchers.slurm.attempt_log import Attempts
from tvr.launchers.slurm.step import Ranks, say


def run_batch(record: Path, line: Sequence[str]) -> int:
    """Runs `line`, which is srun's, for the job of the record; its exit code."""
    try:
        return _run_batch(record, line)
    except ValueError as error:
        # SLURM refuses what is asked of it, or its controller stays away.
        say(str(error))
        return EXIT_FAILED


def _run_batch(record: Path, line: Sequence[str]) -> int:
    job, here = read_record(record), allocation(os.environ)
    attempts = Attempts(job.folder, here.job_id)
    decision = _after_earlier(job, here, attempts)
    if decision and not decision.again:
        return _act(decision, job, here)
    began_s = time.time()
    # Counts, too, where it ends at once: no job may be queued for ever.
    attempts.begin(here.restart, list(here.nodes), began_s)
    unwanted = sorted(set(_left_out(decision, job, here)) & set(here.nodes)) if decision else []
    if unwanted:
        attempts.end(here.restart, _preempted(job, f"it was given {', '.join(unwanted)} again"))
        return _act(_decide(attempts, job), job, here)
    targets = targets_of(job, os.environ.get("SLURM_ARRAY_TASK_ID"), began_s)
    ended = Ranks(job, here, targets, began_s).run(line)
    try:
        if ended.code == EXIT_FAILED and not _is_ours(here):
            # Ranks that SLURM ends, to give their nodes to another job, have not failed.
            ended = _taken_away(here.nodes, began_s, job)
        if ended.code == EXIT_FAILED and taken_over(Path(job.run_dir), here.job_id, began_s):
            ended = replace(ended, node=None, over=True)
    finally:
        attempts.end(here.restart, ended)
    if targets and ended.code in (EXIT_DONE, EXIT_PREEMPTED):
        targets.remove()
    return _act(_decide(attempts, job), job, here)


def _after_earlier(job: Job, here: Allocation, attempts: Attempts) -> Decision | None:
    """What follows from the attempts before; none: this is the first."""
    for attempt in attempts.read():
        if attempt.ended is None and attempt.restart < here.restart:
            attempts.end(attempt.restart, _taken_away(attempt.nodes, attempt.began_s, job))
    return _decide(attempts, job) if here.restart else None


def _taken_away(nodes: Sequence[str], began_s: float, job: Job) -> Ended:
    """How an attempt ended whose batch shell has not said so."""
    for node in nodes:
        if slurm.has_failed(node, began_s):
            saved_step = read_progress(Path(job.run_dir)).saved_step
            reason = f"node {node} failed"
            return Ended(code=EXIT_FAILED, reason=reason, node=node, saved_step=saved_step)
    return _preempted(job, "SLURM took it off its nodes")


def _preempted(job: Job, reason: str) -> Ended:
    saved_step = read_progress(Path(job.run_dir)).saved_step
    return Ended(code=EXIT_PREEMPTED, reason=reason, node=None, saved_step=saved_step)


def _is_ours(here: Allocation) -> bool:
    """Whether SLURM still has this attempt running."""
    (state,) = slurm.job_states(here.name)
    return (state.state, state.restarts) == ("RUNNING", here.restart)


def _decide(attempts: Attempts, job: Job) -> Decision | None:
    ends = [attempt.ended for attempt in attempts.read() if attempt.ended is not None]
    return decide(ends, job.policy) if ends else None


def _act(decision: Decision | None, job: Job, here: Allocation) -> int:
    assert decision is not None, "an attempt has ended"
    if not decision.again:
        say(decision.text)
        return decision.code
    (state,) = slurm.job_states(here.name)
    # A shell that outlived its node's daemon leaves the job alone, and so does one that ends
    # because the job is cancelled.
    if (state.state, state.restarts) != ("RUNNING", here.restart):
        say(f"job {here.name} is {state.state}: not queued again from here")
        return decision.code
    left_out = _left_out(decision, job, here)
    bad = f"{', '.join(decision.exclude)}, which failed {NODE_FAILURES} times"
    if left_out:
        say(f"{decision.text} without {bad}")
    elif decision.exclude:
        say(f"{decision.text}, on any node: {here.partition} has too few without {bad}")
    else:
        say(decision.text)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # comes with the requeue
    slurm.requeue(here.name)
    # Empty is a change, too: what an earlier attempt left out.
    exclude = dict.fromkeys((*job.exclude, *left_out)) if decision.exclude else None
    try:
        slurm.change_queued(here.name, decision.wait_s, exclude)
    except ValueError as error:
        say(f"{error}; it starts again all the same")
    return decision.code


def _left_out(decision: Decision, job: Job, here: Allocation) -> tuple[str, ...]:
    """Nodes that the job is to do without.

    None where its partition has too few others that work: it would wait for ever.
    """
    if not decision.exclude:
        return ()
    usable = slurm.usable_nodes(here.partition) - {*job.exclude, *decision.exclude}
    return decision.exclude if len(usable) >= job.nodes else ()


if __name__ == "__main__":
    sys.exit(run_batch(Path(sys.argv[1]), sys.argv[2:]))
