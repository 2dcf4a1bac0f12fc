"""A run that was launched on SLURM: submitted, looked after, cancelled, submitted again."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tvr.launchers.atomic_write import write_atomically
from tvr.launchers.job import FOLDER, RECORD, Job, read_job, to_json
from tvr.launchers.monitoring.targets import remove_targets
from tvr.launchers.run_status import Progress, notice_for, read_progress
from tvr.launchers.slurm import attempt_log as attempts_of
from tvr.launchers.slurm import commands as slurm
from tvr.launchers.slurm.attempt_log import Attempts
from tvr.launchers.slurm.script import sbatch_script

SCRIPT = "job.sbatch"
SUBMITTED = "submitted.jsonl"
NOT_YET = "-"
# Conditions that hold only once the jobs they name are over.
ENDS = {"afterany", "afterok", "afternotok"}


def submit(job: Job) -> str:
    """Writes record and script into the run's folder, submits it, and returns its number.

    Until SLURM has taken it, nothing that other jobs of the run or their user read has changed.

    Raises:
        ValueError: other jobs of the run go on, and this one does not wait for their end; or SLURM
            refuses it.
    """
    _refuse_two_at_once(job)
    record = job.record(new_name())
    script = record.with_suffix(".sbatch")
    write_atomically(record, to_json(job))
    write_atomically(script, sbatch_script(job, record))
    try:
        job_id = slurm.submit(script)
    except ValueError:
        record.unlink()
        script.unlink()
        raise
    with (job.folder / SUBMITTED).open("a") as file:
        line = {"job_id": job_id, "name": job.name, "at_s": time.time()}
        file.write(json.dumps(line) + "\n")
    write_atomically(job.folder / RECORD, to_json(job))
    script.replace(job.folder / SCRIPT)
    return job_id


def new_name() -> str:
    """For a job's record, before it has a number."""
    return secrets.token_hex(4)


def status(run_dir: Path) -> str:
    """Jobs, attempts and results as tables."""
    read_job(run_dir)
    states = [
        state for job_id in list(_submitted(run_dir))[-1:] for state in slurm.job_states(job_id)
    ]
    parts = [
        _table(
            ("job", "state", "restarts", "nodes", "waits for"),
            [(s.job_id, s.state, s.restarts, s.nodes or NOT_YET, _reason(s)) for s in states],
        ),
        _table(("job", "attempt", "nodes", "ended"), list(_attempt_rows(run_dir, states))),
        _progress_table(run_dir, read_progress(run_dir)),
    ]
    return "\n\n".join(part for part in parts if part)


def logs(run_dir: Path, job_id: str | None, rank: int | None) -> Iterator[str]:
    """Of the batch shell and of rank 0, or of one rank alone.

    Raises:
        ValueError: there are none yet.
    """
    folder = run_dir / FOLDER
    started = sorted(folder.glob("*.out"), key=lambda path: path.stat().st_mtime)
    if job_id is None and not started:
        raise ValueError(f"{folder} holds no output yet")
    job_id = job_id or started[-1].stem
    paths = [folder / f"{job_id}.rank-{rank or 0:05d}.log"]
    if rank is None:
        paths.insert(0, folder / f"{job_id}.out")
    found = [path for path in paths if path.exists()]
    if not found:
        raise ValueError(f"{folder} holds no output of {', '.join(path.name for path in paths)}")
    for path in found:
        yield path.read_text(errors="replace")


def cancel(run_dir: Path) -> str:
    """Ends the run's jobs and returns their numbers.

    Raises:
        ValueError: none goes on.
    """
    job = read_job(run_dir)
    going_on = _going_on(run_dir)
    if not going_on:
        raise ValueError(f"no job of {run_dir} goes on")
    for job_id in going_on:
        slurm.cancel(job_id)
    remove_targets(job)
    return ", ".join(going_on)


def resume(run_dir: Path) -> str:
    """Submits the run's job again, with a new budget, and returns its number.

    Raises:
        ValueError: its job goes on, or SLURM refuses it.
    """
    job = read_job(run_dir)
    again = replace(job, dependency=None)  # it waits for nothing any more
    if not job.notice_given:
        # How long a save takes is known by now.
        again = replace(again, notice_s=notice_for(read_progress(run_dir)))
    return submit(again)


def waits_for(dependency: str, names: Mapping[str, str], name: str) -> bool:
    """Whether a job called `name` begins only after the end of all of these: numbers and names."""
    # A comma asks for all conditions, a question mark for any one of them.
    return all(
        names.keys() <= _ends_in(part, names, name) for part in dependency.lower().split("?")
    )


def _ends_in(conditions: str, names: Mapping[str, str], name: str) -> set[str]:
    """The jobs whose end conditions wait for."""
    ended: set[str] = set()
    for condition in conditions.split(","):
        kind, *jobs = condition.split(":")
        if kind == "singleton":
            ended |= {job_id for job_id, other in names.items() if other == name}
        elif kind in ENDS:
            ended |= set(jobs)
    return ended


def _refuse_two_at_once(job: Job) -> None:
    """Two jobs would take the run from one another."""
    going_on = _going_on(Path(job.run_dir))
    if going_on and not waits_for(job.dependency or "", going_on, job.name):
        raise ValueError(
            f"job {', '.join(going_on)} of {job.run_dir} goes on; wait for it, cancel it, or give"
            f" --dependency afterany:{':'.join(going_on)}"
        )


def _going_on(run_dir: Path) -> dict[str, str]:
    """Names of the jobs that are not over, by their numbers."""
    return {
        job_id: name
        for job_id, name in _submitted(run_dir).items()
        if any(not state.is_over for state in slurm.job_states(job_id))
    }


def _submitted(run_dir: Path) -> dict[str, str]:
    """Names of all jobs by their numbers, as they came."""
    path = run_dir / FOLDER / SUBMITTED
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["job_id"]: line["name"] for line in map(json.loads, lines)}


def _reason(state: slurm.JobState) -> str:
    return state.reason if state.state == "PENDING" else NOT_YET


def _attempt_rows(run_dir: Path, states: Sequence[slurm.JobState]) -> Iterator[tuple[object, ...]]:
    folder = run_dir / FOLDER
    for path in sorted((folder / attempts_of.FOLDER).glob("*.jsonl")):
        for attempt in Attempts(folder, path.stem).read():
            ended = attempt.ended
            text = f"{ended.code}: {ended.reason}" if ended else NOT_YET
            yield path.stem, attempt.restart, ",".join(attempt.nodes), text


def _progress_table(run_dir: Path, progress: Progress) -> str:
    config = run_dir / "config.json"
    steps = json.loads(config.read_text())["train"]["steps"] if config.exists() else NOT_YET
    newest = {
        "step": f"{progress.step['step']} of {steps}" if progress.step else NOT_YET,
        "loss": f"{progress.step['loss']:.4f}" if progress.step else NOT_YET,
        "pairs/s": f"{progress.step['samples_per_s']:.1f}" if progress.step else NOT_YET,
        "saved": progress.saved_step or NOT_YET,
    }
    return _table(tuple(newest), [tuple(newest.values())])


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
