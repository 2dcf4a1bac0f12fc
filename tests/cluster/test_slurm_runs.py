"""Jobs of one run: what a submission leaves, and what it must not touch; SLURM's commands are
stand-ins that note what they are given."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tvr.launchers.job import Job, read_job, read_record
from tvr.launchers.slurm import submit as runs

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


@pytest.mark.parametrize(
    ("dependency", "waits"),
    [
        ("afterany:1:2", True),
        ("afterok:2,afternotok:1", True),
        ("AfterAny:2:9:1", True),
        ("singleton", False),
        ("singleton,afterany:2", True),
        ("afterany:1", False),
        ("afterany:1:2_3", False),
        ("after:1:2", False),
        ("after:1+5,afterany:1:2", True),
        ("afterany:1?afterany:2", False),
        ("afterok:1:2?afternotok:1:2", True),
        ("", False),
    ],
)
def test_a_second_job_of_a_run_must_wait_for_all_that_go_on(
    dependency: str, waits: bool, slurm: Slurm, job: Job
) -> None:
    runs.submit(job)
    runs.submit(replace(job, name="other", dependency="afterany:1"))
    third = replace(job, dependency=dependency or None)
    if waits:
        assert runs.submit(third) == "3"
        return
    with pytest.raises(ValueError, match=r"job 1, 2 of .* --dependency afterany:1:2"):
        runs.submit(third)
    slurm.ended("1")
    slurm.ended("2")
    assert runs.submit(third) == "3"


def test_one_at_a_time_is_for_jobs_of_one_name(slurm: Slurm, job: Job) -> None:
    one_at_a_time = replace(job, dependency="singleton")
    assert [runs.submit(job), runs.submit(one_at_a_time)] == ["1", "2"]
    with pytest.raises(ValueError, match="job 1, 2 of"):
        runs.submit(replace(one_at_a_time, name="other"))


@pytest.mark.parametrize(("given", "notice_s"), [(True, 90), (False, 60)])
def test_resume_keeps_the_users_notice_and_measures_its_own(
    given: bool, notice_s: int, slurm: Slurm, job: Job
) -> None:
    runs.submit(replace(job, notice_s=90, notice_given=given))
    slurm.ended("1")
    log = [{"event": "saved", "step": 1, "seconds": 25.5}, {"event": "step", "step_s": 4.0}]
    (job.folder.parent / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    again = slurm.record(runs.resume(Path(job.run_dir)))
    assert (again.notice_s, again.notice_given) == (notice_s, given)
