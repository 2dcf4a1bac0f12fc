"""Decisions of the batch shell after an attempt, with fake SLURM commands.

The fake commands reply as SLURM does in the named cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tvr.launchers.job import Container, Job, to_json
from tvr.launchers.restart_policy import AttemptEnd, RestartPolicy
from tvr.launchers.slurm import commands
from tvr.launchers.slurm.attempt_log import AttemptLog
from tvr.launchers.slurm.script import sbatch_script

# Commands for job 17. Files hold the nodes, the state of the job, and the commands that fail.
FAKE_COMMANDS = {
    "scontrol": """\
echo "$*" >> calls
[[ -e fails ]] && grep -qF "$1" fails && { echo "$1: Invalid node name specified" >&2; exit 1; }
case "$*" in
  *"show node"*) echo "NodeName=$4 NodeAddr=127.0.0.1 $(< node)" ;;
  *"show job"*) echo "JobId=17 JobState=$(< state) Restarts=${SLURM_RESTART_COUNT:-0}" ;;
esac
""",
    "sinfo": "cat nodes\n",
    "squeue": 'echo "squeue: error: Access denied" >&2; exit 1\n',
    "sbatch": 'echo "sbatch $*" >> calls; env > sbatch-env; cp "${@: -1}" script; echo 18\n',
    "srun": 'echo ran >> calls; echo "srun: error: n1: task 0: Killed" >&2; exit 137\n',
}
REQUEUE = ["requeue 17", "update JobId=17 ExcNodeList="]
NO_BACK_OFF = RestartPolicy(back_off_s=0)
FAILED = AttemptEnd(code=3, reason="no", node="n1", saved_step=0)


@dataclass(frozen=True)
class BatchShell:
    """Batch shell of job 17, which runs on n1 and excludes n4."""

    folder: Path
    policy: RestartPolicy = NO_BACK_OFF

    @property
    def attempts(self) -> AttemptLog:
        return AttemptLog(self.folder / "launch", "17")

    @property
    def job(self) -> Job:
        return Job(
            command=("x",),
            run_dir=str(self.folder),
            directory=str(self.folder),
            python=sys.executable,
            name="x",
            exclude=("n4",),
            policy=self.policy,
        )

    def write_record(self, job: Job) -> Path:
        record = self.folder / "launch" / "record.json"
        record.write_text(to_json(job))
        return record

    def batch_line(self, job: Job) -> list[str]:
        record = self.write_record(job)
        return [sys.executable, "-m", "tvr.launchers.slurm.batch_main", str(record), "srun"]

    def execute(
        self, *line: str, restart: int = 0, path: str | None = None, **further: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command with the environment that SLURM gives to the batch shell."""
        variables = {"JOB_ID": "17", "JOB_NODELIST": "n1", "JOB_PARTITION": "main"}
        variables |= ({"RESTART_COUNT": str(restart)} if restart else {}) | further
        environment = {f"SLURM_{name}": value for name, value in variables.items()}
        environment["PATH"] = path or f"{self.folder}:{os.environ['PATH']}"
        return subprocess.run(
            line, cwd=self.folder, env=environment, capture_output=True, text=True
        )

    def run(self, restart: int) -> tuple[int, list[str], list[str]]:
        """Returns the exit code, the calls that change SLURM's state, and the log messages."""
        (self.folder / "calls").write_text("")
        result = self.execute(*self.batch_line(self.job), restart=restart)
        calls = [
            line
            for line in (self.folder / "calls").read_text().splitlines()
            if not line.startswith("--oneliner")
        ]
        messages = [line for line in result.stderr.splitlines() if not line.startswith("srun: ")]
        return result.returncode, calls, [line.removeprefix("tvr launch: ") for line in messages]

    def record_failures(self, times: int) -> None:
        for restart in range(times):
            self.attempts.record_start(restart, ["n1"], 5.0)
            self.attempts.record_end(restart, FAILED)


@pytest.fixture
def shell(tmp_path: Path) -> BatchShell:
    (tmp_path / "launch").mkdir()
    for name, text in FAKE_COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "node").write_text("State=IDLE BootTime=1 SlurmdStartTime=2")
    (tmp_path / "state").write_text("RUNNING")
    (tmp_path / "nodes").write_text("n1 mixed\nn2 allocated\nn3 down*\nn4 idle\n")
    return BatchShell(tmp_path)


def test_node_that_failed_twice_is_excluded(shell: BatchShell) -> None:
    shell.record_failures(1)
    code, calls, messages = shell.run(1)
    assert (code, calls) == (3, ["ran", REQUEUE[0], REQUEUE[1] + "n4,n1"])
    assert messages == ["rank 0 on n1: Killed; restarting without n1, which failed 2 times"]


@pytest.mark.parametrize("state", ["down", "drained", "idle*", "draining", "fail"])
def test_no_node_is_excluded_if_too_few_would_remain(shell: BatchShell, state: str) -> None:
    (shell.folder / "nodes").write_text(f"n1 mixed\nn2 {state}\nn4 idle\n")
    shell.record_failures(1)
    code, calls, messages = shell.run(1)
    assert (code, calls) == (3, ["ran", REQUEUE[0], REQUEUE[1] + "n4"])
    assert messages == [
        "rank 0 on n1: Killed; restarting on any node: partition main has too few without n1,"
        " which failed 2 times"
    ]


def test_job_on_an_excluded_node_is_requeued_within_the_budget(
    shell: BatchShell,
) -> None:
    shell.record_failures(2)
    (shell.folder / "fails").write_text("update\n")
    code, calls, messages = shell.run(2)
    assert (code, calls) == (75, [REQUEUE[0], REQUEUE[1] + "n4,n1"])
    assert (
        messages[0]
        == "SLURM allocated the excluded node n1; restarting without n1, which failed 2 times"
    )
    rejection = "scontrol update: update: Invalid node name specified"
    assert messages[1:] == [f"{rejection}; the job restarts without this change"]
    assert [attempt.end and attempt.end.code for attempt in shell.attempts.read()] == [3, 3, 75]
    few = BatchShell(shell.folder, RestartPolicy(max_restarts=3))
    assert few.run(3) == (
        75,
        [],
        ["SLURM allocated the excluded node n1; stopped after 3 restarts (--max-restarts)"],
    )


def test_job_runs_on_a_failed_node_if_there_is_no_other(shell: BatchShell) -> None:
    (shell.folder / "nodes").write_text("n1 mixed\n")
    (shell.folder / "srun").write_text("#!/bin/bash\necho ran >> calls\n")
    shell.record_failures(2)
    assert shell.run(2) == (0, ["ran"], ["done"])


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ("State=IDLE BootTime=1 SlurmdStartTime=2", (75, None)),
        ("State=IDLE BootTime=1 SlurmdStartTime=6", (3, "n1")),
        ("State=IDLE BootTime=6 SlurmdStartTime=6", (3, "n1")),
        ("State=IDLE BootTime=None SlurmdStartTime=None", (75, None)),
        ("State=DOWN* BootTime=1 SlurmdStartTime=2", (3, "n1")),
    ],
)
def test_node_that_restarted_or_is_down_has_failed(
    shell: BatchShell, node: str, expected: tuple[int, str | None]
) -> None:
    (shell.folder / "node").write_text(node)
    shell.attempts.record_start(0, ["n1"], 5.0)
    shell.run(1)
    first = shell.attempts.read()[0].end
    assert first is not None
    assert (first.code, first.node) == expected


def test_ranks_that_slurm_killed_count_as_preempted(shell: BatchShell) -> None:
    (shell.folder / "state").write_text("PENDING")
    assert shell.run(0) == (75, ["ran"], ["job 17 is PENDING: this attempt does not requeue it"])


def test_superseded_job_stops_and_blames_no_node(shell: BatchShell) -> None:
    # The trainer writes this record when a second job starts on the run folder.
    record = 'mkdir attempts; echo \'{"job": "0", "restart": 0}\' > attempts/000002.json'
    srun = 'echo "srun: error: n1: task 0: Exited with exit code 3" >&2; exit 3'
    (shell.folder / "srun").write_text(f"#!/bin/bash\n{record}\n{srun}\n")
    reason = "rank 0 on n1: Exited with exit code 3"
    message = f"{reason}; no restart: another job has taken over the run"
    assert shell.run(0) == (3, [], [message])
    (attempt,) = shell.attempts.read()
    assert attempt.end == replace(FAILED, reason=reason, node=None, superseded=True)


def test_ranks_run_in_a_container(shell: BatchShell) -> None:
    # Drops srun's options and runs one rank.
    variables = "PROCID=0 NTASKS=1 LOCALID=0 NTASKS_PER_NODE=1".split()
    (shell.folder / "srun").write_text(
        "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"
        f'exec env {" ".join(f"SLURM_{variable}" for variable in variables)} "$@"\n'
    )
    # Prints its arguments, and runs the command without the image.
    apptainer = shell.folder / "apptainer"
    apptainer.write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@"\nuntil [[ $1 == *.sif ]]; do shift; done\nexec "${@:2}"\n'
    )
    apptainer.chmod(0o755)
    image = Container(
        image="/images/a b.sif",
        runtime="apptainer",
        mounts=("/data:/d",),
        python=sys.executable,
    )
    job = replace(shell.job, command=("tvr", "--version"), container=image)
    script = sbatch_script(job, shell.write_record(job))
    result = shell.execute("bash", "-c", script)
    assert (result.returncode, result.stderr) == (0, "tvr launch: done\n")
    lines = result.stdout.splitlines()
    folder = shell.folder
    assert lines[0] == "exec"
    assert {f"--bind={folder}:{folder}", "--bind=/data:/d", f"--pwd={folder}"} <= set(lines)
    assert "/images/a b.sif" in lines
    assert lines[-1].startswith("tvr ")


def test_node_list_and_address_without_scontrol(shell: BatchShell) -> None:
    (shell.folder / "scontrol").unlink()
    print_address = 'echo "$MASTER_ADDR" > address\n'
    (shell.folder / "srun").write_text(f"#!/bin/bash\n{print_address}")
    line = shell.batch_line(shell.job)
    aliases = {"NODE_ALIASES": "n1:10.1.2.3:host1,n2:10.1.2.4:host2"}
    for further, address in (({}, "n1"), (aliases, "10.1.2.3")):
        (shell.folder / "launch" / "attempts" / "17.jsonl").unlink(missing_ok=True)
        result = shell.execute(*line, path=str(shell.folder), **further)
        assert result.returncode == 0, result.stderr
        assert (shell.folder / "address").read_text().strip() == address
        assert (
            f"scontrol is not installed: SLURM's commands are needed; the ranks meet at {address}"
            in result.stderr
        )


@pytest.mark.parametrize(
    ("error", "times"),
    [
        ("Unable to contact slurm controller (connect failure)", 3),
        ("Unable to contact slurm controller (receive failure)", 1),
        ("Socket timed out on send/recv operation", 1),
        ("Invalid partition name specified", 1),
    ],
)
def test_submission_is_retried_only_if_the_first_cannot_have_arrived(
    error: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "sbatch"
    program.write_text(f"#!/bin/bash\necho x >> {tmp_path}/count; echo '{error}' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(commands, "RETRY_WAITS_S", (0, 0))
    with pytest.raises(ValueError, match="sbatch --parsable"):
        commands.submit_script(tmp_path / "job.sbatch")
    assert len((tmp_path / "count").read_text().split()) == times


def test_requeue_of_a_queued_job_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, error = tmp_path / "scontrol", tmp_path / "error"
    program.write_text(f"#!/bin/bash\ncat {error} >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    error.write_text("Job is pending execution for job 17\n")
    commands.requeue_job("17")
    error.write_text("Job is not requeueable for job 17\n")
    with pytest.raises(ValueError, match="not requeueable"):
        commands.requeue_job("17")


@pytest.mark.parametrize("task", ["0", "1"])
def test_a_task_of_an_array_reads_its_own_progress(shell: BatchShell, task: str) -> None:
    """Each failure came after a new checkpoint, so the budget of 3 without one is not spent."""
    job = replace(
        shell.job,
        command=("tvr", "train", "--run-dir", "runs/%a"),
        array="0-1",
        policy=RestartPolicy(back_off_s=0, max_failures=3),
    )
    own = shell.folder / "runs" / task
    own.mkdir(parents=True)
    report = {"rank": 0, "host": "n1", "code": 3, "error": "of this task", "of": None}
    (shell.folder / "srun").write_text(
        "#!/bin/bash\n"
        f"cd {own}; mkdir -p failures\n"
        "step=$(( ${SLURM_RESTART_COUNT:-0} * 10 + 10 ))\n"
        'echo "{\\"event\\": \\"saved\\", \\"step\\": $step, \\"seconds\\": 1}" >> log.jsonl\n'
        f"echo '{json.dumps(report)}' > failures/$step.json\n"
        'echo "srun: error: n1: task 0: Exited with exit code 3" >&2; exit 3\n'
    )
    (shell.folder / "calls").write_text("")
    line = shell.batch_line(job)
    array = ["env", "SLURM_ARRAY_JOB_ID=17", f"SLURM_ARRAY_TASK_ID={task}"]
    for restart in range(5):
        result = shell.execute(*array, *line, restart=restart)
        assert "rank 0 on n1: of this task; restarting" in result.stderr
    ends = [attempt.end for attempt in shell.attempts.read()]
    assert [end and end.saved_step for end in ends] == [10, 20, 30, 40, 50]
