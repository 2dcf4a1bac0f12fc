"""Continues a job that restarts: SLURM requeues it, or a new job takes over when it has ended.

A site may forbid requeues, and `scontrol` may fail or be missing on the nodes. Work that is left
then goes on in a job that depends on the end of this one and shares its restart budget.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from tvr.launchers.exit_codes import EXIT_DONE
from tvr.launchers.job import Job
from tvr.launchers.restart_policy import AttemptEnd, RestartDecision
from tvr.launchers.sbatch_options import for_a_later_start
from tvr.launchers.slurm import commands
from tvr.launchers.slurm.allocation import Allocation
from tvr.launchers.slurm.attempt_log import AttemptLog
from tvr.launchers.slurm.environment import command_environment
from tvr.launchers.slurm.sbatch_reply import ReplyLost
from tvr.launchers.slurm.step import log
from tvr.launchers.slurm.submission import write_and_submit


def earlier_ends(job: Job) -> list[AttemptEnd]:
    """Ends of the attempts of the jobs that a job continues."""
    logs = [AttemptLog(job.launch_dir, job_id) for job_id in job.continues]
    return [attempt.end for each in logs for attempt in each.read() if attempt.end is not None]


def continue_job(
    job: Job,
    allocation: Allocation,
    decision: RestartDecision,
    excluded: Sequence[str],
    *,
    may_requeue: bool,
) -> int:
    """Requeues this job or submits one that continues it, and returns this attempt's exit code.

    Args:
        job: This job.
        allocation: Its resources.
        decision: The decision that it restarts.
        excluded: Nodes to exclude from now on, if `decision.exclude` names any.
        may_requeue: False if this attempt may not be the job's current one: a requeue would then
            end a newer attempt.
    """
    reason = "the state of this job is unknown"
    if may_requeue:
        try:
            commands.requeue_job(allocation.full_id)
        except ValueError as error:
            reason = str(error)
        else:
            _update(job, allocation, decision, excluded)
            return decision.code
    begin = [f"--begin=now+{decision.wait_s:.0f}"] if decision.wait_s else []
    following = following_job(job, allocation, decision, excluded)
    try:
        # A dependency holds on the job's own cluster only.
        submitted, _ = write_and_submit(following, begin, command_environment(os.environ))
    except ReplyLost as error:
        log(f"{reason}; whether a job continues the run is unknown: {error}")
        return decision.code
    except ValueError as error:
        log(
            f"{reason}; {error}; NOT FINISHED, and no job continues the run: start it again with"
            f" `tvr launch resume {job.run_dir}` where sbatch works"
        )
        return decision.code
    log(f"{reason}; job {submitted.job_id} continues the run when this one has ended")
    # To SLURM, this job has done its part: its end must not count as a failure.
    return EXIT_DONE


def following_job(
    job: Job, allocation: Allocation, decision: RestartDecision, excluded: Sequence[str]
) -> Job:
    """The job that continues a job, or one task of an array, when it has ended."""
    return replace(
        job,
        dependency=f"afterany:{allocation.full_id}",
        array=allocation.task,
        sbatch=for_a_later_start(job.sbatch),
        continues=(*job.continues, allocation.job_id),
        failed_nodes=tuple(excluded) if decision.exclude else job.failed_nodes,
    )


def _update(
    job: Job, allocation: Allocation, decision: RestartDecision, excluded: Sequence[str]
) -> None:
    # An empty list is a change, too: it clears the nodes that an earlier attempt excluded.
    exclude = dict.fromkeys((*job.exclude, *excluded)) if decision.exclude else None
    try:
        commands.update_queued_job(allocation.full_id, decision.wait_s, exclude)
    except ValueError as error:
        log(f"{error}; the job restarts without this change")
