"""A run that was launched on SLURM: submitted, looked after, cancelled, submitted again."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tvr.launchers import attempts as attempts_of
from tvr.launchers import slurm
from tvr.launchers.attempts import Attempts
from tvr.launchers.job import FOLDER, RECORD, Job, read_job, to_json, write_whole
from tvr.launchers.progress import Progress, notice_for, read_progress
from tvr.launchers.sbatch import sbatch_script
from tvr.launchers.targets import Targets

SCRIPT = "job.sbatch"
SUBMITTED = "submitted.jsonl"
NOT_YET = "-"


def submit(job: Job) -> str:
    """Writes record and script into the run's folder, submits it, and returns its number.

    Until SLURM has taken it, nothing that other jobs of the run or their user read has changed.

    Raises:
        ValueError: another job of the run goes on, and this one does not wait for it; or SLURM
            refuses it.
    """
    if job.dependency is None:
        _refuse_two_at_once(Path(job.run_dir))
    record = job.record(new_name())
    script = record.with_suffix(".sbatch")
    write_whole(record, to_json(job))
    write_whole(script, sbatch_script(job, record))
    try:
        job_id = slurm.submit(script)
    except ValueError:
        record.unlink()
        script.unlink()
        raise
    with (job.folder / SUBMITTED).open("a") as file:
        file.write(json.dumps({"job_id": job_id, "at_s": time.time()}) + "\n")
    write_whole(job.folder / RECORD, to_json(job))
    script.replace(job.folder / SCRIPT)
    return job_id


def new_name() -> str:
    """For a job's record, before it has a number."""
    return secrets.token_hex(4)


def status(run_dir: Path) -> str:
    """Jobs, attempts and results as tables."""
    read_job(run_dir)
    states = [state for job_id in _submitted(run_dir)[-1:] for state in slurm.job_states(job_id)]
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
    if job.targets:
        Targets(Path(job.targets), run_dir, time.time()).remove()
    return ", ".join(going_on)


def resume(run_dir: Path) -> str:
    """Submits the run's job again, with a new budget, and returns its number.

    Raises:
        ValueError: its job goes on, or SLURM refuses it.
    """
    job = read_job(run_dir)
    _refuse_two_at_once(run_dir)
    # It waits for nothing any more, and how long a save takes is known by now.
    return submit(replace(job, dependency=None, notice_s=notice_for(read_progress(run_dir))))


def _refuse_two_at_once(run_dir: Path) -> None:
    going_on = _going_on(run_dir)
    if going_on:
        raise ValueError(
            f"job {', '.join(going_on)} of {run_dir} goes on; wait for it, cancel it, or give"
            f" --dependency afterany:{going_on[-1]}"
        )


def _going_on(run_dir: Path) -> list[str]:
    return [
        job_id
        for job_id in _submitted(run_dir)
        if any(not state.is_over for state in slurm.job_states(job_id))
    ]


def _submitted(run_dir: Path) -> list[str]:
    path = run_dir / FOLDER / SUBMITTED
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["job_id"] for line in lines]


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
