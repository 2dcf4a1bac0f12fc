"""Records of a run's submissions, and one submission: record, script, sbatch."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tvr.launchers.atomic_write import write_atomically
from tvr.launchers.job import LAUNCH_DIR, Job, to_json
from tvr.launchers.slurm import commands
from tvr.launchers.slurm.sbatch_reply import ReplyLost, SubmittedJob
from tvr.launchers.slurm.script import sbatch_script

SUBMISSIONS_FILE = "submitted.jsonl"
CANCELLED_DIR = "cancelled"
"""Folder of empty files, named by the IDs of the jobs that the user has cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A submitted job of a run."""

    name: str
    cluster: str | None
    """Name of its cluster if that is not the default one."""


def new_record_name() -> str:
    """Returns a unique name for a job's record: the job has no ID before it is submitted."""
    return secrets.token_hex(4)


def write_and_submit(
    job: Job, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> tuple[SubmittedJob, Path]:
    """Writes a job's record and script, submits it, and returns it with the script's path.

    Args:
        job: The job.
        options: Options of sbatch that override the script.
        environment: Variables of the caller; None means this process's.

    Raises:
        ReplyLost: the job may be queued, but its ID is unknown. Its files stay.
        ValueError: SLURM rejects the job. No file is left behind.
    """
    record = job.record_path(new_record_name())
    script = record.with_suffix(".sbatch")
    write_atomically(record, to_json(job))
    write_atomically(script, sbatch_script(job, record))
    try:
        submitted = commands.submit_script(script, options, environment)
    except ReplyLost:
        raise
    except ValueError:
        record.unlink()
        script.unlink()
        raise
    if submitted.cluster is None and job.continues:
        # Within a job, sbatch submits to the job's own cluster without naming it.
        earlier = read_submissions(Path(job.run_dir)).get(job.continues[-1])
        submitted = replace(submitted, cluster=None if earlier is None else earlier.cluster)
    line: dict[str, object] = {"job_id": submitted.job_id, "name": job.name, "at_s": time.time()}
    if submitted.cluster is not None:
        line["cluster"] = submitted.cluster
    with (job.launch_dir / SUBMISSIONS_FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")
    return submitted, script


def read_submissions(run_dir: Path) -> dict[str, Submission]:
    """All jobs of a run by ID, in the order of submission."""
    path = run_dir / LAUNCH_DIR / SUBMISSIONS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return {
        line["job_id"]: Submission(name=line["name"], cluster=line.get("cluster"))
        for line in map(json.loads, lines)
    }


def mark_cancelled(run_dir: Path, job_id: str) -> None:
    """Records that the user cancels a job, so that it is not continued."""
    path = run_dir / LAUNCH_DIR / CANCELLED_DIR / job_id
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def is_cancelled(launch_dir: Path, full_id: str) -> bool:
    """True if the user has cancelled a job, or the array of a task.

    Args:
        launch_dir: Folder of the job's files.
        full_id: `JOB`, or `ARRAY_TASK`.
    """
    return (launch_dir / CANCELLED_DIR / full_id.partition("_")[0]).exists()
