"""Jobs of one run: what a submission leaves, and what it must not touch; SLURM's commands are
stand-ins that note what they are given."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tvr.launchers import runs
from tvr.launchers.job import Job, read_job, read_record

SBATCH = """#!/bin/bash
[[ -e '{folder}/refuse' ]] && echo 'sbatch: error: Invalid qos' >&2 && exit 1
number=$(($(ls '{folder}/jobs' | wc -l) + 1))
cp "${{@: -1}}" "{folder}/script.$number"
echo RUNNING > "{folder}/jobs/$number"
echo "$number"
"""
SCONTROL = """#!/bin/bash
file="{folder}/jobs/${{@: -1}}"
[[ -e $file ]] || {{ echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; }}
echo "JobId=${{@: -1}} JobState=$(< "$file") Restarts=0 Reason=None NodeList=n1"
"""
SCANCEL = """#!/bin/bash
echo CANCELLED > "{folder}/jobs/$1"
"""


@dataclass(frozen=True, slots=True)
class Slurm:
    """Its jobs, as files."""

    folder: Path

    def ended(self, job_id: str) -> None:
        (self.folder / "jobs" / job_id).write_text("COMPLETED")

    def refuses(self) -> None:
        (self.folder / "refuse").touch()

    def record(self, job_id: str) -> Job:
        """What a job reads, by its script."""
        script = (self.folder / f"script.{job_id}").read_text()
        (path,) = re.findall(r"tvr\.launchers\.batch (\S+)", script)
        return read_record(Path(path))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    folder = tmp_path / "slurm"
    (folder / "jobs").mkdir(parents=True)
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Slurm(folder)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(
        command=("tvr", "train"),
        run_dir=str(tmp_path / "run"),
        directory=str(tmp_path),
        python="python3",
        name="run",
    )


def files(folder: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_job_keeps_what_it_was_submitted_with(slurm: Slurm, job: Job) -> None:
    first, two = runs.submit(job), replace(job, nodes=2, dependency="afterany:1")
    second = runs.submit(two)
    assert (first, second) == ("1", "2")
    assert (slurm.record(first), slurm.record(second)) == (job, two)
    assert read_job(Path(job.run_dir)) == two
    script = (job.folder / "job.sbatch").read_text()
    assert script == (slurm.folder / f"script.{second}").read_text()
    slurm.ended(first)
    assert runs.cancel(Path(job.run_dir)) == second
    third = runs.resume(Path(job.run_dir))
    assert slurm.record(third) == replace(two, dependency=None)


def test_a_refused_job_leaves_a_run_as_it_was(slurm: Slurm, job: Job) -> None:
    runs.submit(job)
    before = files(job.folder)
    slurm.refuses()
    with pytest.raises(ValueError, match="Invalid qos"):
        runs.submit(replace(job, nodes=2, dependency="afterany:1"))
    assert files(job.folder) == before
