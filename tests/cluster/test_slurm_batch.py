"""What the batch shell does at the ends of a job's attempts, with commands that answer as SLURM's
did in the cases that are named; no cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tvr.launchers.job import Job, to_json
from tvr.launchers.restart_policy import Ended, Policy
from tvr.launchers.slurm import commands as slurm
from tvr.launchers.slurm.attempt_log import Attempts

# Of one job, 17. What nodes there are, whether it still runs and what fails stands in files.
COMMANDS = {
    "scontrol": """\
echo "$*" >> asked
[[ -e refused ]] && grep -qF "$1" refused && { echo "$1: Invalid node name specified" >&2; exit 1; }
case "$*" in
  *"show node"*) echo "NodeName=$4 NodeAddr=127.0.0.1 $(< node)" ;;
  *"show job"*) echo "JobId=17 JobState=$(< state) Restarts=${SLURM_RESTART_COUNT:-0}" ;;
esac
""",
    "sinfo": "cat nodes\n",
    "srun": 'echo ran >> asked; echo "srun: error: n1: task 0: Killed" >&2; exit 137\n',
}
AGAIN = ["requeue 17", "update JobId=17 ExcNodeList="]
AT_ONCE = Policy(back_off_s=0)
FAILED = Ended(code=3, reason="no", node="n1", saved_step=0)


@dataclass(frozen=True)
class Shell:
    """The batch shell of job 17, which runs on n1 and may not have n4."""

    folder: Path
    policy: Policy = AT_ONCE

    @property
    def attempts(self) -> Attempts:
        return Attempts(self.folder / "launch", "17")

    def run(self, restart: int) -> tuple[int, list[str], list[str]]:
        """Its exit code, what it asked SLURM to do, and what it said."""
        job = Job(
            command=("x",),
            run_dir=str(self.folder),
            directory=str(self.folder),
            python=sys.executable,
            name="x",
            exclude=("n4",),
            policy=self.policy,
        )
        record = self.folder / "launch" / "record.json"
        record.write_text(to_json(job))
        (self.folder / "asked").write_text("")
        slurms = {"JOB_ID": "17", "JOB_NODELIST": "n1", "JOB_PARTITION": "main"}
        slurms |= {"RESTART_COUNT": str(restart)} if restart else {}
        ended = subprocess.run(
            [sys.executable, "-m", "tvr.launchers.slurm.batch_main", str(record), "srun"],
            cwd=self.folder,
            env={
                "PATH": f"{self.folder}:{os.environ['PATH']}",
                **{f"SLURM_{name}": value for name, value in slurms.items()},
            },
            capture_output=True,
            text=True,
        )
        asked = [
            line
            for line in (self.folder / "asked").read_text().splitlines()
            if not line.startswith("--oneliner")
        ]
        said = [line for line in ended.stderr.splitlines() if not line.startswith("srun: ")]
        return ended.returncode, asked, [line.removeprefix("tvr launch: ") for line in said]

    def failed(self, times: int) -> None:
        for restart in range(times):
            self.attempts.begin(restart, ["n1"], 5.0)
            self.attempts.end(restart, FAILED)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    (tmp_path / "launch").mkdir()
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "node").write_text("State=IDLE BootTime=1 SlurmdStartTime=2")
    (tmp_path / "state").write_text("RUNNING")
    (tmp_path / "nodes").write_text("n1 mixed\nn2 allocated\nn3 down*\nn4 idle\n")
    return Shell(tmp_path)


def test_a_node_that_failed_twice_is_left_out(shell: Shell) -> None:
    shell.failed(1)
    code, asked, said = shell.run(1)
    assert (code, asked) == (3, ["ran", AGAIN[0], AGAIN[1] + "n4,n1"])
    assert said == ["rank 0 on n1: Killed; starts again without n1, which failed 2 times"]


@pytest.mark.parametrize("state", ["down", "drained", "idle*", "draining", "fail"])
def test_but_not_where_the_job_would_wait_for_ever(shell: Shell, state: str) -> None:
    (shell.folder / "nodes").write_text(f"n1 mixed\nn2 {state}\nn4 idle\n")
    shell.failed(1)
    code, asked, said = shell.run(1)
    assert (code, asked) == (3, ["ran", AGAIN[0], AGAIN[1] + "n4"])
    assert said == [
        "rank 0 on n1: Killed; starts again, on any node: main has too few without n1, which"
        " failed 2 times"
    ]


def test_a_job_that_is_given_such_a_node_once_more_goes_back_a_number_of_times(
    shell: Shell,
) -> None:
    shell.failed(2)
    (shell.folder / "refused").write_text("update\n")
    code, asked, said = shell.run(2)
    assert (code, asked) == (75, [AGAIN[0], AGAIN[1] + "n4,n1"])
    assert said[0] == "it was given n1 again; starts again without n1, which failed 2 times"
    refusal = "scontrol update: update: Invalid node name specified"
    assert said[1:] == [f"{refusal}; it starts again all the same"]
    assert [attempt.ended and attempt.ended.code for attempt in shell.attempts.read()] == [3, 3, 75]
    few = Shell(shell.folder, Policy(max_restarts=3))
    assert few.run(3) == (
        75,
        [],
        ["it was given n1 again; stopped after 3 restarts (--max-restarts)"],
    )


def test_and_runs_there_where_there_is_no_other(shell: Shell) -> None:
    (shell.folder / "nodes").write_text("n1 mixed\n")
    (shell.folder / "srun").write_text("#!/bin/bash\necho ran >> asked\n")
    shell.failed(2)
    assert shell.run(2) == (0, ["ran"], ["done"])


@pytest.mark.parametrize(
    ("node", "ended"),
    [
        ("State=IDLE BootTime=1 SlurmdStartTime=2", (75, None)),
        ("State=IDLE BootTime=1 SlurmdStartTime=6", (3, "n1")),
        ("State=IDLE BootTime=6 SlurmdStartTime=6", (3, "n1")),
        ("State=IDLE BootTime=None SlurmdStartTime=None", (75, None)),
        ("State=DOWN* BootTime=1 SlurmdStartTime=2", (3, "n1")),
    ],
)
def test_a_node_that_was_down_since_has_failed(
    shell: Shell, node: str, ended: tuple[int, str | None]
) -> None:
    (shell.folder / "node").write_text(node)
    shell.attempts.begin(0, ["n1"], 5.0)
    shell.run(1)
    first = shell.attempts.read()[0].ended
    assert first is not None
    assert (first.code, first.node) == ended


def test_ranks_that_slurm_killed_have_not_failed(shell: Shell) -> None:
    (shell.folder / "state").write_text("PENDING")
    assert shell.run(0) == (75, ["ran"], ["job 17 is PENDING: not queued again from here"])


def test_a_refusal_is_said_and_the_end_is_written_down(shell: Shell) -> None:
    (shell.folder / "state").write_text("RUNNING")
    scontrol = shell.folder / "scontrol"
    refuse = '[[ "$*" == *"show job"* ]] && { echo "Access denied" >&2; exit 1; }\n'
    scontrol.write_text(scontrol.read_text().replace("\n", f"\n{refuse}", 1))
    assert shell.run(0) == (3, ["ran"], ["scontrol --oneliner: Access denied"])
    (attempt,) = shell.attempts.read()
    assert attempt.ended is not None
    assert attempt.ended.reason == "rank 0 on n1: Killed"


@pytest.mark.parametrize(
    ("words", "times"),
    [
        ("Unable to contact slurm controller (connect failure)", 3),
        ("Unable to contact slurm controller (receive failure)", 1),
        ("Socket timed out on send/recv operation", 1),
        ("Invalid partition name specified", 1),
    ],
)
def test_a_job_is_given_again_only_where_the_first_one_cannot_have_come(
    words: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "sbatch"
    program.write_text(f"#!/bin/bash\necho x >> {tmp_path}/count; echo '{words}' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "WAITS_S", (0, 0))
    with pytest.raises(ValueError, match="sbatch --parsable"):
        slurm.submit(tmp_path / "job.sbatch")
    assert len((tmp_path / "count").read_text().split()) == times


def test_a_job_that_is_queued_already_needs_no_second_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, said = tmp_path / "scontrol", tmp_path / "said"
    program.write_text(f"#!/bin/bash\ncat {said} >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said.write_text("Job is pending execution for job 17\n")
    slurm.requeue("17")
    said.write_text("Job is not requeueable for job 17\n")
    with pytest.raises(ValueError, match="not requeueable"):
        slurm.requeue("17")
