"""Submits, inspects, cancels and resubmits the SLURM jobs of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tvr.launchers.atomic_write import write_atomically
from tvr.launchers.job import (
    JOB_FILE,
    LAUNCH_DIR,
    MIN_EXIT_GRACE_S,
    Job,
    all_run_dirs,
    default_exit_grace_s,
    read_job,
    to_json,
)
from tvr.launchers.monitoring.targets import remove_targets
from tvr.launchers.run_status import (
    DEFAULT_NOTICE_S,
    RunProgress,
    notice_seconds,
    read_progress,
)
from tvr.launchers.slurm import commands
from tvr.launchers.slurm.attempt_log import ATTEMPTS_DIR, AttemptLog
from tvr.launchers.slurm.submission import (
    Submission,
    mark_cancelled,
    read_submissions,
    write_and_submit,
)

SCRIPT_FILE = "job.sbatch"
EMPTY_CELL = "-"
# Dependency types that hold only after the named jobs have ended.
AFTER_END = {"afterany", "afterok", "afternotok"}


def submit_job(job: Job) -> str:
    """Writes a job's record and script, submits it, and returns its ID.

    Files that other jobs of the run or the user read change only after sbatch accepts the job.

    Raises:
        ReplyLost: the job may be queued, but its ID is unknown.
        ValueError: another job of the run is unfinished and this one does not wait for its end, or
            SLURM rejects the job.
    """
    _refuse_concurrent_jobs(job)
    submitted, script = write_and_submit(job)
    write_atomically(job.launch_dir / JOB_FILE, to_json(job))
    script.replace(job.launch_dir / SCRIPT_FILE)
    return submitted.job_id


def run_report(run_dir: Path) -> str:
    """Formats the newest job's state, all attempts, and the progress of a run as tables.

    Raises:
        ValueError: the run was not launched on SLURM.
    """
    job = read_job(run_dir)
    states = _shown_states(run_dir)
    parts = [
        _table(
            ("job", "state", "restarts", "nodes", "pending reason"),
            [
                (s.job_id, s.state, s.restarts, s.nodes or EMPTY_CELL, _pending_reason(s))
                for s in states
            ],
        ),
        _table(("sbatch option",), [(f"--{option}",) for option in job.sbatch]),
        _table(("job", "attempt", "nodes", "ended"), list(_attempt_rows(run_dir))),
        *(
            _progress_table(folder, read_progress(folder), is_task=job.array is not None)
            for folder in all_run_dirs(job)
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def read_logs(run_dir: Path, job_id: str | None, rank: int | None) -> Iterator[str]:
    """Yields the output of a job: of one rank, or of the batch shell and rank 0.

    Args:
        run_dir: Run folder.
        job_id: Job; None selects the one with the newest output.
        rank: Rank; None selects the batch shell and rank 0.

    Raises:
        ValueError: there is no such output.
    """
    folder = run_dir / LAUNCH_DIR
    started = sorted(folder.glob("*.out"), key=lambda path: path.stat().st_mtime)
    if job_id is None and not started:
        raise ValueError(f"{folder} contains no output yet")
    job_id = job_id or started[-1].stem
    paths = [folder / f"{job_id}.rank-{rank or 0:05d}.log"]
    if rank is None:
        paths.insert(0, folder / f"{job_id}.out")
    found = [path for path in paths if path.exists()]
    if not found:
        raise ValueError(f"{folder} does not contain {', '.join(path.name for path in paths)}")
    for path in found:
        yield path.read_text(errors="replace")


def cancel_jobs(run_dir: Path) -> str:
    """Cancels the run's unfinished jobs and returns their IDs.

    Raises:
        ValueError: the run has no unfinished job.
    """
    job = read_job(run_dir)
    unfinished = _unfinished(run_dir)
    if not unfinished:
        raise ValueError(f"{run_dir} has no unfinished job")
    for job_id, submission in unfinished.items():
        mark_cancelled(run_dir, job_id)
        commands.cancel_job(job_id, submission.cluster)
    remove_targets(job)
    return ", ".join(unfinished)


def resubmit_job(run_dir: Path) -> str:
    """Submits the run's newest job again with a new restart budget, and returns its ID.

    Raises:
        ValueError: a job of the run is unfinished, or SLURM rejects the job.
    """
    job = read_job(run_dir)
    # The time of a save may have been measured since.
    return submit_job(with_measured_notice(replace(job, dependency=None)))


def with_measured_notice(job: Job) -> Job:
    """Derives the notice from the slowest save of the job's tasks, unless the user gave it."""
    if job.notice_given:
        return job
    measured = [notice_seconds(read_progress(folder)) for folder in all_run_dirs(job)]
    grace_s = job.exit_grace_s
    if grace_s is None:
        grace_s = default_exit_grace_s(job.nodes * job.ranks_per_node)
    # The smallest grace lies within the notice's own margin.
    extra_s = math.ceil(max(0.0, grace_s - MIN_EXIT_GRACE_S))
    return replace(job, notice_s=max(measured, default=DEFAULT_NOTICE_S) + extra_s)


def waits_for_all(dependency: str, names: Mapping[str, str], name: str) -> bool:
    """True if a job starts only after all given jobs have ended.

    Args:
        dependency: Value of `sbatch --dependency`.
        names: Names of the given jobs by ID.
        name: Name of the job to submit, for `singleton`.
    """
    # A comma joins conditions that must all hold; of those joined by a question mark, one suffices.
    return all(
        names.keys() <= _waited_for(part, names, name) for part in dependency.lower().split("?")
    )


def _waited_for(conditions: str, names: Mapping[str, str], name: str) -> set[str]:
    """IDs of the jobs whose ends the conditions wait for."""
    waited: set[str] = set()
    for condition in conditions.split(","):
        kind, *job_ids = condition.split(":")
        if kind == "singleton":
            waited |= {job_id for job_id, other in names.items() if other == name}
        elif kind in AFTER_END:
            waited |= set(job_ids)
    return waited


def _refuse_concurrent_jobs(job: Job) -> None:
    """Two concurrent jobs would supersede each other's attempts."""
    unfinished = {job_id: each.name for job_id, each in _unfinished(Path(job.run_dir)).items()}
    if unfinished and not waits_for_all(job.dependency or "", unfinished, job.name):
        raise ValueError(
            f"job {', '.join(unfinished)} of {job.run_dir} is unfinished; wait for it, cancel it,"
            f" or give --dependency afterany:{':'.join(unfinished)}"
        )


def _unfinished(run_dir: Path) -> dict[str, Submission]:
    """The run's pending and running jobs by ID."""
    return {
        job_id: submission
        for job_id, submission in read_submissions(run_dir).items()
        if any(not state.is_finished for state in _states(job_id, submission))
    }


def _shown_states(run_dir: Path) -> list[commands.JobState]:
    """States of the newest job and, as one may continue another, of all unfinished ones."""
    submissions = read_submissions(run_dir)
    states = {job_id: _states(job_id, each) for job_id, each in submissions.items()}
    newest = list(submissions)[-1:]
    return [
        state
        for job_id, found in states.items()
        if job_id in newest or any(not state.is_finished for state in found)
        for state in found
    ]


def _states(job_id: str, submission: Submission) -> list[commands.JobState]:
    return commands.job_states(job_id, submission.cluster)


def _pending_reason(state: commands.JobState) -> str:
    return state.reason if state.state == "PENDING" else EMPTY_CELL


def _attempt_rows(run_dir: Path) -> Iterator[tuple[object, ...]]:
    folder = run_dir / LAUNCH_DIR
    for path in sorted((folder / ATTEMPTS_DIR).glob("*.jsonl")):
        for attempt in AttemptLog(folder, path.stem).read():
            end = attempt.end
            text = f"{end.code}: {end.reason}" if end else EMPTY_CELL
            yield path.stem, attempt.restart, ",".join(attempt.nodes), text


def _progress_table(run_dir: Path, progress: RunProgress, *, is_task: bool) -> str:
    config = run_dir / "config.json"
    steps = json.loads(config.read_text())["train"]["steps"] if config.exists() else EMPTY_CELL
    step = progress.step
    cells: dict[str, object] = {"run": run_dir.name} if is_task else {}
    cells |= {
        "step": f"{step['step']} of {steps}" if step else EMPTY_CELL,
        "loss": f"{step['loss']:.4f}" if step else EMPTY_CELL,
        "pairs/s": f"{step['samples_per_s']:.1f}" if step else EMPTY_CELL,
        "saved": progress.saved_step or EMPTY_CELL,
    }
    return _table(tuple(cells), [tuple(cells.values())])


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
