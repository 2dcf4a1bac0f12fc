"""Jobs on a real cluster of SLURM daemons.

`tvr launch slurm` gives the same losses as `tvr launch local`, bit for bit, whatever happens to
ranks, nodes and the job meanwhile.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from builders import jobs
from builders.exhaustive import further, is_collected
from builders.slurm_cluster import Cluster, cluster_of, rank_pid, until
from builders.tiny import tiny_config, with_ranks

from tvr.data_prep.demo_clips import ANNOTATIONS
from tvr.launchers.process import is_running
from tvr.launchers.restart_policy import AttemptEnd
from tvr.launchers.slurm.attempt_log import AttemptLog, JobAttempt
from tvr.launchers.slurm.nodelist import expand_nodes
from tvr.trainer.config import Config, to_json

STEPS, SAVE_EVERY = 30, 5
TWO_NODES = ("--nodes", "2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_of(8) as cluster, pytest.MonkeyPatch.context() as patch:
        for name in ("PATH", "SLURM_CONF"):
            patch.setenv(name, cluster.environment[name])
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('it\'s a "cluster"')


@pytest.fixture(scope="module")
def config(data: Path) -> Config:
    return tiny_config(
        data,
        # With a worker: a process that must survive the notice to its rank.
        data={"test_exchanged": None, "workers": 1},
        train={"steps": STEPS, "zero_stage": 1, "eval_every": 0},
        checkpoint={"every": SAVE_EVERY},
    )


@dataclass(frozen=True, slots=True)
class LaunchedJob:
    """A submitted job."""

    cluster: Cluster
    run_dir: Path
    job_id: str

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Waits for a condition, and fails with the output if the job ends before."""
        until(lambda: done() or self.state in ("FAILED", "CANCELLED"), what)
        assert done(), self.output

    @property
    def state(self) -> str:
        return self.cluster.job(self.job_id)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.job_id)["Restarts"])

    @property
    def output(self) -> str:
        """Output of the batch shell and the ranks."""
        files = sorted((self.run_dir / "launch").glob(f"{self.job_id}.*"))
        return "\n".join(path.read_text() for path in files)

    @property
    def attempts(self) -> list[JobAttempt]:
        return AttemptLog(self.run_dir / "launch", self.job_id).read()

    @property
    def ends(self) -> list[AttemptEnd]:
        return [attempt.end for attempt in self.attempts if attempt.end]

    def until_done(self) -> None:
        assert self.cluster.until_ended(self.job_id) == "COMPLETED", self.output

    def wait_for_step(self, step: int) -> None:
        self.until(lambda: jobs.steps_logged(self.run_dir) >= step, f"step {step}")

    def suspend_ranks(self) -> list[int]:
        """Suspends both ranks; those of the next attempt if this one ends meanwhile."""
        while True:
            pids = self.pids(2)
            with suppress(ProcessLookupError):
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
                return pids

    @contextmanager
    def suspended_at(self, step: int) -> Iterator[list[int]]:
        """Suspends both ranks soon after this step; yields their process IDs."""
        self.wait_for_step(step)
        pids = self.suspend_ranks()
        yield pids
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def pids(self, ranks: int) -> list[int]:
        found: list[int] = []
        for rank in range(ranks):
            self.until(lambda rank=rank: rank_pid(self.run_dir, rank) is not None, f"rank {rank}")
            pid = rank_pid(self.run_dir, rank)
            assert pid is not None
            found.append(pid)
        return found


def random_step(seed: int) -> int:
    """A step in the first third of the run, the same in every repetition of the test."""
    return random.Random(seed).randint(5, STEPS // 3)


def tvr(*argv: str) -> str:
    """Returns stdout of `tvr launch ...`."""
    line = [sys.executable, "-m", "tvr.launchers.cli", "launch", *argv]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def launch(cluster: Cluster, run_dir: Path, *options: str, command: list[str]) -> LaunchedJob:
    common = ["--run-dir", str(run_dir), "--interface", "lo", "--back-off", "0"]
    return LaunchedJob(cluster, run_dir, tvr("slurm", *common, *options, "--", *command).strip())


def train(
    cluster: Cluster, config: Config, run_dir: Path, *options: str, ranks: int = 2
) -> LaunchedJob:
    settings = run_dir.with_suffix(".json")
    settings.write_text(to_json(with_ranks(config, ranks)))
    command = ["tvr", "train", "--config", str(settings), "--run-dir", str(run_dir)]
    return launch(cluster, run_dir, *options, command=command)


@pytest.fixture(scope="module")
def failing(cluster: Cluster, folder: Path) -> LaunchedJob:
    """A job that fails on every node and reports the node."""
    script = 'echo "no good: $SLURMD_NODENAME" >&2; exit 3'
    return launch(cluster, folder / "failing", "--back-off", "1", command=["bash", "-c", script])


@pytest.fixture(scope="module")
def expiring(
    cluster: Cluster, folder: Path, config: Config, failing: LaunchedJob
) -> Iterator[LaunchedJob]:
    """A job with a time limit of two minutes, suspended from a random step until the notice.

    The limit ends only the first attempt: on a busy machine, two minutes may not suffice for the
    rest of the run.
    """
    options = (*TWO_NODES, "--time", "2", "--notice", "45")
    job = train(cluster, config, folder / "expiring", *options)
    job.wait_for_step(random_step(1))
    pids = job.suspend_ranks()

    def resume_after_notice() -> None:
        until(lambda: all(_has_notice(pid) for pid in pids), "the notice")
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        until(lambda: job.restarts == 1, "the restart")
        cluster.run("scontrol", "update", f"JobId={job.job_id}", "TimeLimit=60")

    # Other tests run in the meantime.
    waiting = threading.Thread(target=resume_after_notice)
    waiting.start()
    yield job
    waiting.join()


@pytest.fixture(scope="module")
def orphaned(cluster: Cluster, folder: Path, config: Config, expiring: LaunchedJob) -> LaunchedJob:
    """A job whose node daemon is killed while its ranks are suspended."""
    # The expiring job needs its nodes.
    options = ("--ranks-per-node", "2", "--exclude", ",".join(expiring.attempts[0].nodes))
    job = train(cluster, config, folder / "orphaned", *options)
    job.wait_for_step(random_step(2))
    job.suspend_ranks()
    cluster.kill_node_daemon(cluster.job(job.job_id)["NodeList"])
    return job


@pytest.fixture(scope="module")
def losses(folder: Path, config: Config, request: pytest.FixtureRequest) -> list[float]:
    """Losses of the same run under `tvr launch local`."""
    # Jobs that wait for minutes wait while this one runs.
    if is_collected(request, "test_orphans_behind_a_dead_node_daemon_cannot_write"):
        request.getfixturevalue("orphaned")
    elif is_collected(request, "test_time_limit_saves_and_restarts"):
        request.getfixturevalue("expiring")
    code, errors = jobs.run(config, folder / "local", 2)
    assert code == 0, errors
    found = jobs.losses(folder / "local")
    assert len(found) == STEPS
    return found


def test_two_nodes_give_the_losses_of_one_machine(
    cluster: Cluster, folder: Path, config: Config, losses: list[float]
) -> None:
    targets = folder / "prometheus"
    job = train(cluster, config, folder / "two nodes", *TWO_NODES, "--targets", str(targets))
    job.until(lambda: any(map(_read, targets.glob("*.json"))), "targets for Prometheus")
    job.until_done()
    assert list(targets.iterdir()) == []
    assert jobs.losses(job.run_dir) == losses
    assert _read(job.run_dir / "evaluation.json") == _read(folder / "local" / "evaluation.json")
    assert [len(attempt.nodes) for attempt in job.attempts] == [2]
    assert [end.code for end in job.ends] == [0]
    status = tvr("status", str(job.run_dir))
    assert f"{job.job_id}  COMPLETED  0" in status
    assert f"{STEPS} of {STEPS}" in status
    assert f"{losses[-1]:.4f}" in status
    assert f"step {STEPS}/{STEPS}" in tvr("logs", str(job.run_dir))
    assert "step" not in tvr("logs", str(job.run_dir), "--rank", "1")


def test_notice_and_a_killed_rank_restart_from_the_last_checkpoint(
    cluster: Cluster, folder: Path, config: Config, losses: list[float]
) -> None:
    job = train(cluster, config, folder / "preempted", *TWO_NODES)
    with job.suspended_at(random_step(3)):
        cluster.run("scancel", "--batch", "--signal=USR1", job.job_id)
    job.until(lambda: job.restarts == 1, "the first restart")
    saved = jobs.events(job.run_dir, "preempted")[-1]["step"]
    with job.suspended_at(saved + 6) as pids:
        os.kill(pids[1], signal.SIGKILL)
    job.until_done()
    assert jobs.losses(job.run_dir) == losses
    notice, killed, _ = job.ends
    assert [end.code for end in job.ends] == [75, 3, 0]
    assert notice.reason == f"tvr train: step {saved} is saved; asked to stop by SIGUSR1"
    node = job.attempts[1].nodes[1]
    assert (killed.node, killed.reason) == (node, f"rank 1 on {node}: Killed")
    # The notice costs no step; the kill costs those since the last checkpoint.
    resumed = [event["step"] for event in jobs.events(job.run_dir, "resumed")]
    assert resumed[0] == saved
    # A save that is under way when the ranks are suspended may still be published.
    assert killed.saved_step is not None
    following = (killed.saved_step // SAVE_EVERY + 1) * SAVE_EVERY
    assert resumed[1] in (killed.saved_step, following)


def test_job_that_always_fails_stops_and_logs_the_reason(
    cluster: Cluster, failing: LaunchedJob
) -> None:
    assert cluster.until_ended(failing.job_id) == "FAILED"
    assert cluster.job(failing.job_id)["ExitCode"] == "3:0"
    first, second, third = (attempt.nodes[0] for attempt in failing.attempts)
    assert first == second != third
    assert cluster.job(failing.job_id)["ExcNodeList"] == first
    messages = [line for line in failing.output.splitlines() if line.startswith("tvr launch: ")]
    assert messages == [
        f"tvr launch: no good: {first}; restarting in 1 s",
        f"tvr launch: no good: {first}; restarting in 2 s without {first}, which failed 2 times",
        f"tvr launch: no good: {third}; stopped after 3 failures without a new checkpoint"
        " (--max-failures)",
    ]


@pytest.mark.exhaustive
def test_job_preempted_by_slurm_has_not_failed(cluster: Cluster, folder: Path) -> None:
    # Same as a preemption with PreemptMode=REQUEUE; the command reports nothing.
    script = 'n=${SLURM_RESTART_COUNT:-0}; touch "$1-$n"; ((n >= 2)) || exec sleep 100'
    began = folder / "began here"
    command = ["bash", "-c", script, "bash", str(began)]
    job = launch(cluster, folder / "requeued", command=command)
    for restart in range(2):
        job.until(
            lambda n=restart: Path(f"{began}-{n}").exists() and job.state == "RUNNING",
            f"attempt {restart}",
        )
        # The second emulates a GraceTime: SIGTERM to ranks while the job is still RUNNING.
        how = ["scancel", "--signal=TERM"] if restart == 1 else ["scontrol", "requeue"]
        cluster.run(*how, job.job_id)
    job.until_done()
    assert [(end.code, end.node) for end in job.ends] == [(75, None)] * 2 + [(0, None)]
    assert cluster.job(job.job_id)["ExcNodeList"] == "(null)"


@pytest.mark.exhaustive
def test_time_limit_saves_and_restarts(expiring: LaunchedJob, losses: list[float]) -> None:
    expiring.until_done()
    assert [end.code for end in expiring.ends] == [75, 0]
    assert expiring.restarts == 1
    assert jobs.losses(expiring.run_dir) == losses


@pytest.mark.exhaustive
def test_orphans_behind_a_dead_node_daemon_cannot_write(
    cluster: Cluster, orphaned: LaunchedJob, losses: list[float]
) -> None:
    run_dir = orphaned.run_dir
    (node,) = orphaned.attempts[0].nodes
    orphans = orphaned.pids(2)
    orphaned.until(lambda: (run_dir / "attempts" / "000002.json").exists(), "a new attempt")
    assert all(is_running(pid) for pid in orphans)
    for pid in orphans:
        os.kill(pid, signal.SIGCONT)
    until(lambda: not any(is_running(pid) for pid in orphans), "the orphans end")
    orphaned.until_done()
    assert "attempt 1 at" in orphaned.output
    assert "is over: a newer attempt has begun" in orphaned.output
    assert f"job {orphaned.job_id} is PENDING: this attempt does not requeue it" in orphaned.output
    assert jobs.losses(run_dir) == losses
    assert len(list((run_dir / "attempts").iterdir())) == 2
    assert (orphaned.restarts, orphaned.ends[0].node) == (1, node)
    cluster.start_node(node)
    cluster.until_idle(cluster.nodes)


@pytest.mark.exhaustive
def test_four_nodes_train_together(cluster: Cluster, folder: Path, data: Path) -> None:
    config = tiny_config(
        data, data={"test": None, "test_exchanged": None}, train={"steps": 3, "zero_stage": 1}
    )
    # The cluster's GPUs are not real: conftest sets DS_ACCELERATOR=cpu, which the job captures.
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    options = ("--nodes", "4", "--gpus-per-node", "1", "--cpus-per-rank", "2", "--mem", "100M")
    job = train(cluster, config, folder / "four", *options, ranks=4)
    job.until_done()
    assert len(jobs.losses(job.run_dir)) == 3
    assert len(job.attempts[0].nodes) == 4


@pytest.mark.exhaustive
def test_array_packs_a_data_set_although_one_task_is_killed(
    cluster: Cluster, folder: Path, data: Path
) -> None:
    out = folder / "packed"
    options = "--layout frames --num-frames 3 --short-side 16 --samples-per-shard 10 --no-words"
    options += " --shuffle-seed None"  # the order of the data set that it is compared with
    annotations = data / "clips" / "train" / ANNOTATIONS
    command = ["tvr", "pack", "--task", "%a/3", "--annotations", str(annotations)]
    job = launch(
        cluster,
        folder / "packing",
        *("--array", "0-2"),
        command=[*command, "--out", str(out), *options.split()],
    )
    killed: list[int] = []

    def kill() -> bool:
        # The task whose job ID is also that of the whole array.
        pid = _pack_pid(out, job.job_id)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return bool(killed)

    until(kill, "a task")
    until(lambda: _is_completed(cluster, job.job_id), "the array")
    tasks = json.loads((out / "manifest.json").read_text())["shards"]
    assert len(tasks) == 5
    for shard in sorted(data.glob("train/*.tar")):
        assert (out / shard.name).read_bytes() == shard.read_bytes()
    codes = [
        [attempt.end.code for attempt in AttemptLog(job.run_dir / "launch", path.stem).read()]
        for path in (job.run_dir / "launch" / "attempts").iterdir()
    ]
    assert sorted(codes) == [[0], [0], [3, 0]]


@pytest.mark.exhaustive
def test_jobs_are_cancelled_resumed_and_chained(cluster: Cluster, folder: Path) -> None:
    targets, run_dir = folder / "targets", folder / "managed run"
    group = '[{"targets": ["n1:9100"], "labels": {"run": "x"}}]'
    script = f"mkdir -p metrics; echo '{group}' > metrics/n1.json; sleep 60"
    command = ["bash", "-c", f'cd "$1"; {script}', "bash", str(run_dir)]
    first = launch(cluster, run_dir, "--targets", str(targets), command=command)
    until(lambda: [*map(_read, targets.glob("*.json"))] == [json.loads(group)], "its targets file")
    refused = subprocess.run(
        [sys.executable, "-m", "tvr.launchers.cli", "launch", "resume", str(run_dir)],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert f"job {first.job_id} of {run_dir} is unfinished; wait for it" in refused.stderr
    assert tvr("cancel", str(run_dir)) == f"cancelled: {first.job_id}\n"
    assert cluster.until_ended(first.job_id) == "CANCELLED"
    until(lambda: "this attempt does not requeue it" in first.output, "the end of its batch shell")
    assert "restarting" not in first.output
    assert list(targets.iterdir()) == []
    second = tvr("resume", str(run_dir)).strip()
    assert f"{second}  " in tvr("status", str(run_dir))
    until(lambda: cluster.job(second)["JobState"] == "RUNNING", "the second job runs")
    after = ("--dependency", f"afterany:{second}")
    third = launch(cluster, run_dir, *after, command=["bash", "-c", "exit 0"])
    assert (third.state, cluster.job(third.job_id)["Reason"]) == ("PENDING", "Dependency")
    cluster.run("scancel", second)
    third.until_done()
    assert first.restarts == 0


@pytest.mark.exhaustive
def test_a_job_that_may_not_be_requeued_goes_on_in_another(
    cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options of `--sbatch` hold in both jobs, and the shell's SBATCH_TIMELIMIT in neither."""
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1")
    released = folder / "released"
    script = 'until [[ -e $1 ]]; do sleep 0.2; done; [[ -e $1.first ]] && exit 0; touch "$1.first"'
    command = ["bash", "-c", f"{script}; exit 75", "bash", str(released)]
    options = ("--time", "60", "--sbatch", "--comment=tvr --gres=gpu:1")
    first = launch(cluster, folder / "continued", *options, command=command)
    first.until(lambda: first.state == "RUNNING", "the first job runs")
    cluster.run("scontrol", "update", f"JobId={first.job_id}", "Requeue=0")
    released.touch()
    assert cluster.until_ended(first.job_id) == "COMPLETED", first.output
    assert "continues the run when this one has ended" in first.output
    lines = (first.run_dir / "launch" / "submitted.jsonl").read_text().splitlines()
    second = LaunchedJob(cluster, first.run_dir, json.loads(lines[-1])["job_id"])
    second.until_done()
    assert second.job_id != first.job_id
    assert [[end.code for end in job.ends] for job in (first, second)] == [[75], [0]]
    for job in (first, second):
        shown = cluster.job(job.job_id)
        assert (shown["TimeLimit"], shown["Comment"]) == ("01:00:00", "tvr")
        assert "gpu:1" in shown["TresPerNode"]


@pytest.mark.parametrize(
    "nodelist", ["gpu[08-10,12],login", *further("n[1-3]", "r[1-2]n[3-4]", "a[9-11]")]
)
def test_node_lists_are_expanded_like_slurm(cluster: Cluster, nodelist: str) -> None:
    assert cluster.run("scontrol", "show", "hostnames", nodelist).split() == expand_nodes(nodelist)


def _has_notice(pid: int) -> bool:
    """True if SIGUSR1 is pending for a suspended process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pending = next(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd"))
    return bool(pending >> signal.SIGUSR1 - 1 & 1)


def _read(path: Path) -> object:
    return json.loads(path.read_text())


def _is_completed(cluster: Cluster, job_id: str) -> bool:
    text = cluster.run("scontrol", "--oneliner", "show", "job", job_id)
    return text.count("JobState=COMPLETED") == len(text.splitlines())


def _pack_pid(out: Path, job_id: str) -> int | None:
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if line[1:3] == [b"-m", b"tvr.launchers.slurm.task_main"] and os.fsencode(out) in line:
            if f"SLURM_JOB_ID={job_id}".encode() in environment:
                return int(folder.name)
    return None
