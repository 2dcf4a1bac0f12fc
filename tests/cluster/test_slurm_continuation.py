"""A job that SLURM does not requeue goes on in another job, with fake SLURM commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tvr.launchers.job import Job, read_job_record, to_json
from tvr.launchers.restart_policy import AttemptEnd, RestartPolicy
from tvr.launchers.slurm.attempt_log import AttemptLog
from tvr.launchers.slurm.submission import mark_cancelled

# Commands for the job in $SLURM_JOB_ID. The file `broken` holds the sub-commands of scontrol that
# fail, with the site's words.
COMMANDS = {
    "scontrol": """\
while read -r name words; do
  [[ -n $name && " $* " == *" $name "* ]] && { echo "$words" >&2; exit 1; }
done < broken
case "$*" in
  *"show node"*) echo "NodeName=n1 NodeAddr=127.0.0.1 State=IDLE BootTime=1 SlurmdStartTime=2" ;;
  *"show job"*) echo "JobId=$SLURM_JOB_ID JobState=RUNNING Restarts=${SLURM_RESTART_COUNT:-0}" ;;
  *) echo "$*" >> calls ;;
esac
""",
    "sinfo": "printf 'n1 mixed\\nn2 idle\\n'\n",
    "squeue": 'echo "squeue: error: Access denied" >&2; exit 1\n',
    "sbatch": """\
[[ -e no-sbatch ]] && { echo 'sbatch: error: Access/permission denied' >&2; exit 1; }
echo "sbatch ${*:1:$#-1}" >> calls; env > sbatch-environment; cp "${@: -1}" script
echo $((SLURM_TEST_NEXT + $(wc -l < calls)))
""",
    "srun": """\
echo "srun: error: n1: task 0: Exited with exit code $(< code)" >&2
exit "$(< code)"
""",
}
REFUSALS = {
    "not requeueable": "requeue Job is not requeueable for job 17",
    "disabled": "requeue Requested operation is presently disabled for job 17",
    "all of scontrol": "show slurm_load_jobs error: Access denied\nrequeue Access denied",
}


@dataclass(frozen=True)
class Site:
    """A cluster on which the job runs on n1."""

    folder: Path

    @property
    def job(self) -> Job:
        return Job(
            command=("x",),
            run_dir=str(self.folder / "run"),
            directory=str(self.folder),
            python=sys.executable,
            name="x",
            exclude=("n4",),
            sbatch=("constraint=a100", "hold", "begin=16:00"),
            policy=RestartPolicy(back_off_s=30, max_failures=3),
        )

    def run(self, job: Job, job_id: str = "17", **variables: str) -> tuple[int, list[str], str]:
        """Runs the job's batch shell; returns its exit code, the calls, and its log."""
        record = self.folder / "record.json"
        record.write_text(to_json(job))
        (self.folder / "calls").write_text("")
        slurm = {"JOB_ID": job_id, "JOB_NODELIST": "n1", "JOB_PARTITION": "main"} | variables
        environment = {f"SLURM_{name}": value for name, value in slurm.items()}
        environment |= {"PATH": f"{self.folder}:{os.environ['PATH']}", "SLURM_CONF": "/etc/s.conf"}
        environment |= {"SBATCH_TIMELIMIT": "1", "SLURM_CLUSTERS": "a,b", "HOME_OF_X": "/x"}
        result = subprocess.run(
            [sys.executable, "-m", "tvr.launchers.slurm.batch_main", str(record), "srun"],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return result.returncode, (self.folder / "calls").read_text().splitlines(), result.stderr

    def following(self) -> Job:
        """The job of the script that was submitted last."""
        script = (self.folder / "script").read_text()
        name = script.partition("slurm.batch_main ")[2].split()[0]
        return read_job_record(Path(name))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text.replace('SLURM_TEST_NEXT', '17')}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "broken").write_text("")
    (tmp_path / "code").write_text("75")
    (tmp_path / "run" / "launch").mkdir(parents=True)
    return Site(tmp_path)


@pytest.mark.parametrize("refusal", REFUSALS)
def test_work_that_is_left_goes_on_in_a_job_that_waits_for_this_one(
    site: Site, refusal: str
) -> None:
    (site.folder / "broken").write_text(REFUSALS[refusal] + "\n")
    code, calls, log = site.run(site.job)
    assert (code, calls) == (0, ["sbatch --parsable"])
    assert "job 18 continues the run when this one has ended" in log
    following = site.following()
    assert following == replace(
        site.job, dependency="afterany:17", continues=("17",), sbatch=("constraint=a100",)
    )
    assert "#SBATCH --dependency=afterany:17\n" in (site.folder / "script").read_text()
    (line,) = (site.folder / "run" / "launch" / "submitted.jsonl").read_text().splitlines()
    assert json.loads(line)["job_id"] == "18"
    passed_on = dict(
        line.split("=", 1)
        for line in (site.folder / "sbatch-environment").read_text().splitlines()
        if "=" in line
    )
    assert passed_on["HOME_OF_X"] == "/x"
    slurm = {name for name in passed_on if name.startswith(("SLURM", "SBATCH"))}
    assert slurm == {"SLURM_CONF"}


def test_a_failure_waits_and_excludes_nodes_in_the_following_job(site: Site) -> None:
    (site.folder / "broken").write_text(REFUSALS["disabled"] + "\n")
    (site.folder / "code").write_text("3")
    code, calls, _ = site.run(site.job)
    assert (code, calls) == (0, ["sbatch --parsable --begin=now+30"])
    code, calls, log = site.run(site.following(), "18")
    assert (code, calls) == (0, ["sbatch --parsable --begin=now+60"])
    assert "without n1, which failed 2 times" in log
    assert site.following().failed_nodes == ("n1",)
    assert "#SBATCH --exclude=n4,n1\n" in (site.folder / "script").read_text()
    # The budget of three failures is that of the whole chain.
    code, calls, log = site.run(site.following(), "19")
    assert (code, calls) == (3, [])
    assert "stopped after 3 failures without a new checkpoint" in log


def test_a_task_of_an_array_goes_on_alone(site: Site) -> None:
    (site.folder / "broken").write_text(REFUSALS["disabled"] + "\n")
    job = replace(site.job, command=("x", "%a"), array="0-7%2")
    site.run(job, "20", ARRAY_JOB_ID="17", ARRAY_TASK_ID="3")
    following = site.following()
    assert (following.array, following.dependency) == ("3", "afterany:17_3")
    assert following.continues == ("20",)


def test_without_requeue_and_sbatch_the_log_says_how_to_go_on(site: Site) -> None:
    (site.folder / "broken").write_text(REFUSALS["disabled"] + "\n")
    (site.folder / "no-sbatch").touch()
    code, calls, log = site.run(site.job)
    assert (code, calls) == (75, [])
    assert "Requested operation is presently disabled" in log
    assert "Access/permission denied" in log
    assert "NOT FINISHED, and no job continues the run: start it again with" in log
    assert f"`tvr launch resume {site.folder}/run`" in log
    assert list((site.folder / "run" / "launch").glob("jobs/*")) == []


def test_a_finished_or_cancelled_job_is_not_continued(site: Site) -> None:
    (site.folder / "broken").write_text(REFUSALS["all of scontrol"] + "\n")
    mark_cancelled(site.folder / "run", "17")
    assert site.run(site.job)[:2] == (75, [])
    (site.folder / "srun").write_text("#!/bin/bash\n")
    assert site.run(site.job, "18")[:2] == (0, [])


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("CLUSTER: c\n17        RUNNING             0       n1", (75, ["requeue 17"])),
        # SLURM has requeued the job itself, or the user has cancelled it.
        ("17        PENDING             1", (75, [])),
        ("17        COMPLETING          0       n1", (75, [])),
    ],
)
def test_squeue_knows_the_state_if_scontrol_does_not(
    site: Site, listed: str, expected: tuple[int, list[str]]
) -> None:
    (site.folder / "broken").write_text("show slurm_load_jobs error: Access denied\n")
    (site.folder / "squeue").write_text(f"#!/bin/bash\necho '{listed}'\n")
    assert site.run(site.job)[:2] == expected


def test_a_reply_without_a_number_leaves_the_record_of_the_following_job(site: Site) -> None:
    (site.folder / "broken").write_text(REFUSALS["disabled"] + "\n")
    (site.folder / "sbatch").write_text("#!/bin/bash\necho accepted\n")
    code, _, log = site.run(site.job)
    assert code == 75
    assert "whether a job continues the run is unknown: sbatch accepted the job" in log
    assert len(list((site.folder / "run" / "launch").glob("jobs/*.json"))) == 1


def test_a_job_that_slurm_requeues_is_requeued(site: Site) -> None:
    code, calls, _ = site.run(site.job)
    assert (code, calls) == (75, ["requeue 17"])


def test_an_unanswered_question_ends_no_job(site: Site) -> None:
    """SLURM ended an earlier attempt, and nothing says why: that is no failure of a node."""
    (site.folder / "broken").write_text("show slurm_load_node error: Access denied\n")
    (site.folder / "sinfo").write_text("#!/bin/bash\nexit 1\n")
    (site.folder / "srun").write_text("#!/bin/bash\n")
    log = AttemptLog(site.folder / "run" / "launch", "17")
    for restart in range(2):
        log.record_start(restart, ["n1"], 5.0)
        log.record_end(restart, AttemptEnd(code=3, reason="no", node="n1", saved_step=restart))
    log.record_start(2, ["n1"], 5.0)
    code, _, messages = site.run(site.job, RESTART_COUNT="3")
    assert (code, log.read()[-1].end and log.read()[-1].end.code) == (0, 0), messages
    assert "Access denied; no node is blamed" in messages
    assert "Access denied; the ranks meet at n1" in messages


def test_a_job_runs_without_the_usual_variables_of_slurm(site: Site) -> None:
    (site.folder / "srun").write_text("#!/bin/bash\n")
    old = {"JOB_NODELIST": "", "NODELIST": "n1", "JOB_PARTITION": ""}
    assert site.run(site.job, **old)[0] == 0
    asked = {"JOB_NODELIST": "", "JOB_PARTITION": ""}
    code, _, log = site.run(site.job, "18", **asked)
    assert code == 3
    assert "SLURM names no nodes of job 18: SLURM_JOB_NODELIST is missing" in log


def test_variables_that_override_srun_are_dropped_from_the_step(site: Site) -> None:
    (site.folder / "srun").write_text("#!/bin/bash\nenv > step-environment\n")
    override = {"TIMELIMIT": "1", "LABELIO": "1", "STDERRMODE": "x", "CPU_BIND": "none"}
    code, _, log = site.run(site.job, **override)
    assert code == 0
    passed_on = (site.folder / "step-environment").read_text().splitlines()
    names = {line.partition("=")[0] for line in passed_on}
    assert not names & {"SLURM_TIMELIMIT", "SLURM_LABELIO", "SLURM_STDERRMODE"}
    assert {"SLURM_CPU_BIND", "SLURM_JOB_ID", "SLURM_CONF", "MASTER_ADDR"} <= names
    assert "srun are dropped: SLURM_LABELIO, SLURM_STDERRMODE, SLURM_TIMELIMIT\n" in log


def test_output_in_another_encoding_does_not_end_the_batch_shell(site: Site) -> None:
    (site.folder / "srun").write_text(
        "#!/bin/bash\nprintf 'caf\\xe9\\n' >&2\n"
        "echo 'srun: error: n1: task 0: Killed' >&2; exit 137\n"
    )
    code, calls, log = site.run(site.job)
    assert (code, calls) == (3, ["requeue 17", "update JobId=17 StartTime=now+30"])
    assert "rank 0 on n1: Killed" in log
