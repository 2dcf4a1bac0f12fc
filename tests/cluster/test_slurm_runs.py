"""Submission, cancellation and resubmission of a run's jobs, with fake SLURM commands."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tvr.launchers.job import Job, read_job, read_job_record
from tvr.launchers.slurm.submit import cancel_jobs, resubmit_job, submit_job

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
class FakeSlurm:
    """Fake SLURM whose jobs are files."""

    folder: Path

    def finish(self, job_id: str) -> None:
        (self.folder / "jobs" / job_id).write_text("COMPLETED")

    def reject_jobs(self) -> None:
        (self.folder / "refuse").touch()

    def record(self, job_id: str) -> Job:
        """The record that a job's script names."""
        script = (self.folder / f"script.{job_id}").read_text()
        (path,) = re.findall(r"tvr\.launchers\.slurm\.batch_main (\S+)", script)
        return read_job_record(Path(path))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    folder = tmp_path / "slurm"
    (folder / "jobs").mkdir(parents=True)
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return FakeSlurm(folder)


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


def test_each_job_has_its_own_record(slurm: FakeSlurm, job: Job) -> None:
    first, two = submit_job(job), replace(job, nodes=2, dependency="afterany:1")
    second = submit_job(two)
    assert (first, second) == ("1", "2")
    assert (slurm.record(first), slurm.record(second)) == (job, two)
    assert read_job(Path(job.run_dir)) == two
    script = (job.launch_dir / "job.sbatch").read_text()
    assert script == (slurm.folder / f"script.{second}").read_text()
    slurm.finish(first)
    assert cancel_jobs(Path(job.run_dir)) == second
    third = resubmit_job(Path(job.run_dir))
    assert slurm.record(third) == replace(two, dependency=None)


def test_rejected_job_changes_no_file(slurm: FakeSlurm, job: Job) -> None:
    submit_job(job)
    before = files(job.launch_dir)
    slurm.reject_jobs()
    with pytest.raises(ValueError, match="Invalid qos"):
        submit_job(replace(job, nodes=2, dependency="afterany:1"))
    assert files(job.launch_dir) == before


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
def test_second_job_of_a_run_must_wait_for_all_unfinished_ones(
    dependency: str, waits: bool, slurm: FakeSlurm, job: Job
) -> None:
    submit_job(job)
    submit_job(replace(job, name="other", dependency="afterany:1"))
    third = replace(job, dependency=dependency or None)
    if waits:
        assert submit_job(third) == "3"
        return
    with pytest.raises(ValueError, match=r"job 1, 2 of .* --dependency afterany:1:2"):
        submit_job(third)
    slurm.finish("1")
    slurm.finish("2")
    assert submit_job(third) == "3"


def test_singleton_waits_only_for_jobs_of_the_same_name(slurm: FakeSlurm, job: Job) -> None:
    singleton = replace(job, dependency="singleton")
    assert [submit_job(job), submit_job(singleton)] == ["1", "2"]
    with pytest.raises(ValueError, match="job 1, 2 of"):
        submit_job(replace(singleton, name="other"))


@pytest.mark.parametrize(("given", "notice_s"), [(True, 90), (False, 60)])
def test_resume_keeps_a_given_notice_and_updates_a_measured_one(
    given: bool, notice_s: int, slurm: FakeSlurm, job: Job
) -> None:
    submit_job(replace(job, notice_s=90, notice_given=given))
    slurm.finish("1")
    log = [{"event": "saved", "step": 1, "seconds": 25.5}, {"event": "step", "step_s": 4.0}]
    (job.launch_dir.parent / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    resubmitted = slurm.record(resubmit_job(Path(job.run_dir)))
    assert (resubmitted.notice_s, resubmitted.notice_given) == (notice_s, given)
