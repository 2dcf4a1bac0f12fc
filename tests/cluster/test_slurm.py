"""Jobs on a real cluster of SLURM's daemons: what `tvr launch slurm` trains is what `tvr launch
local` trains, bit for bit, whatever happens to ranks, nodes and the job meanwhile."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from builders import jobs
from builders.slurm_cluster import Cluster, cluster_of, rank_pid, until
from builders.tiny import tiny_config, with_ranks

from tvr.data_prep.demo_clips import ANNOTATIONS
from tvr.launchers.restart_policy import Ended
from tvr.launchers.slurm.attempt_log import Attempt, Attempts
from tvr.launchers.slurm.nodelist import expand_nodes
from tvr.launchers.torchrun.rank_exits import is_alive
from tvr.trainer.config import Config, to_json

STEPS = 120
TRAINED_ON_TWO = ("--nodes", "2")


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
        # A worker: a process that must not die of the notice to its rank.
        data={"test": None, "test_exchanged": None, "workers": 1},
        train={"steps": STEPS, "zero_stage": 1},
        checkpoint={"every": 5},
    )


@dataclass(frozen=True, slots=True)
class Launched:
    """A job of the cluster."""

    cluster: Cluster
    run_dir: Path
    job_id: str

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Waits for what the job must come to."""
        until(lambda: done() or self.state in ("FAILED", "CANCELLED"), what)
        assert done(), self.words

    @property
    def state(self) -> str:
        return self.cluster.job(self.job_id)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.job_id)["Restarts"])

    @property
    def words(self) -> str:
        """What the batch shell and the ranks said."""
        files = sorted((self.run_dir / "launch").glob(f"{self.job_id}.*"))
        return "\n".join(path.read_text() for path in files)

    @property
    def attempts(self) -> list[Attempt]:
        return Attempts(self.run_dir / "launch", self.job_id).read()

    @property
    def ends(self) -> list[Ended]:
        return [attempt.ended for attempt in self.attempts if attempt.ended]

    def until_done(self) -> None:
        assert self.cluster.until_ended(self.job_id) == "COMPLETED", self.words

    def at_step(self, step: int) -> None:
        self.until(lambda: jobs.steps_logged(self.run_dir) >= step, f"step {step}")

    def stop_ranks(self) -> list[int]:
        """Lets both ranks stand still; those of the next attempt if this one ends meanwhile."""
        while True:
            pids = self.pids(2)
            with suppress(ProcessLookupError):
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
                return pids

    def pids(self, ranks: int) -> list[int]:
        found: list[int] = []
        for rank in range(ranks):
            self.until(lambda rank=rank: rank_pid(self.run_dir, rank) is not None, f"rank {rank}")
            pid = rank_pid(self.run_dir, rank)
            assert pid is not None
            found.append(pid)
        return found


def random_step(seed: int) -> int:
    """Somewhere in the run, the same in every repetition of the test."""
    return random.Random(seed).randint(5, STEPS // 2)


def tvr(*argv: str) -> str:
    """What `tvr launch ...` says on stdout."""
    line = [sys.executable, "-m", "tvr.launchers.cli", "launch", *argv]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def launch(cluster: Cluster, run_dir: Path, *options: str, command: list[str]) -> Launched:
    common = ["--run-dir", str(run_dir), "--interface", "lo", "--back-off", "0"]
    return Launched(cluster, run_dir, tvr("slurm", *common, *options, "--", *command).strip())


def train(
    cluster: Cluster, config: Config, run_dir: Path, *options: str, ranks: int = 2
) -> Launched:
    settings = run_dir.with_suffix(".json")
    settings.write_text(to_json(with_ranks(config, ranks)))
    command = ["tvr", "train", "--config", str(settings), "--run-dir", str(run_dir)]
    return launch(cluster, run_dir, *options, command=command)


@pytest.fixture(scope="module")
def failing(cluster: Cluster, folder: Path) -> Launched:
    """A job whose only node says why it cannot work."""
    script = 'echo "no good: $SLURMD_NODENAME" >&2; exit 3'
    return launch(cluster, folder / "failing", "--back-off", "1", command=["bash", "-c", script])


@pytest.fixture(scope="module")
def expiring(
    cluster: Cluster, folder: Path, config: Config, failing: Launched
) -> Iterator[Launched]:
    """A job of two minutes, whose ranks stand still from a random step on until its time ends."""
    options = (*TRAINED_ON_TWO, "--time", "2", "--notice", "45")
    job = train(cluster, config, folder / "expiring", *options)
    job.at_step(random_step(1))
    pids = job.stop_ranks()

    def go_on() -> None:
        until(lambda: all(_has_notice(pid) for pid in pids), "the notice")
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    # Other tests run meanwhile.
    waiting = threading.Thread(target=go_on)
    waiting.start()
    yield job
    waiting.join()


@pytest.fixture(scope="module")
def orphaned(cluster: Cluster, folder: Path, config: Config, expiring: Launched) -> Launched:
    """A job whose node's daemon is gone, while its ranks stand still."""
    # The job whose time ends needs its nodes.
    options = ("--ranks-per-node", "2", "--exclude", ",".join(expiring.attempts[0].nodes))
    job = train(cluster, config, folder / "orphaned", *options)
    job.at_step(random_step(2))
    job.stop_ranks()
    cluster.kill_node_daemon(cluster.job(job.job_id)["NodeList"])
    return job


@pytest.fixture(scope="module")
def losses(folder: Path, config: Config, orphaned: Launched) -> list[float]:
    """Of the run that `tvr launch local` trains, while other jobs wait."""
    code, errors = jobs.run(config, folder / "local", 2)
    assert code == 0, errors
    found = jobs.losses(folder / "local")
    assert len(found) == STEPS
    return found


def test_two_nodes_train_as_one_machine_does(
    cluster: Cluster, folder: Path, config: Config, losses: list[float]
) -> None:
    targets = folder / "prometheus"
    job = train(cluster, config, folder / "two nodes", *TRAINED_ON_TWO, "--targets", str(targets))
    job.until(lambda: any(map(_read, targets.glob("*.json"))), "targets for Prometheus")
    job.until_done()
    assert list(targets.iterdir()) == []
    assert jobs.losses(job.run_dir) == losses
    assert [len(attempt.nodes) for attempt in job.attempts] == [2]
    assert [ended.code for ended in job.ends] == [0]
    status = tvr("status", str(job.run_dir))
    assert f"{job.job_id}  COMPLETED  0" in status
    assert f"{STEPS} of {STEPS}" in status
    assert f"{losses[-1]:.4f}" in status
    assert f"step {STEPS}/{STEPS}" in tvr("logs", str(job.run_dir))
    assert "step" not in tvr("logs", str(job.run_dir), "--rank", "1")


def test_the_demo_on_two_nodes_is_the_demo_on_one_machine(cluster: Cluster, folder: Path) -> None:
    """Its recipe and clips as they are, but fewer; tests/benchmarks/demo_on_slurm.py has all."""
    out = folder / "demo"
    fewer = "--train-clips 384 --test-clips 32 --train.steps 12 --train.eval-every 0".split()
    line = [sys.executable, "-m", "tvr.launchers.cli", "demo", "--out", str(out), *fewer]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    run_dir = folder / "demo on nodes"
    command = ["tvr", "train", "--config", str(out / "settings.json"), "--run-dir", str(run_dir)]
    job = launch(cluster, run_dir, *TRAINED_ON_TWO, "--cpus-per-rank", "1", command=command)
    job.until_done()
    losses = jobs.losses(run_dir)
    assert len(losses) == 12
    assert losses == jobs.losses(out / "run")
    assert _read(run_dir / "evaluation.json") == _read(out / "run" / "evaluation.json")


def test_a_notice_to_the_batch_shell_leads_to_a_checkpoint_and_to_a_restart(
    cluster: Cluster, folder: Path, config: Config, losses: list[float]
) -> None:
    job = train(cluster, config, folder / "preempted", *TRAINED_ON_TWO)
    job.at_step(random_step(3))
    cluster.run("scancel", "--batch", "--signal=USR1", job.job_id)
    job.until(lambda: job.restarts == 1, "the restart")
    job.until_done()
    left = jobs.events(job.run_dir, "preempted")[-1]["step"]
    assert [event["step"] for event in jobs.events(job.run_dir, "resumed")] == [left]
    assert jobs.losses(job.run_dir) == losses
    assert [ended.code for ended in job.ends] == [75, 0]
    assert job.ends[0].reason == (f"tvr train: step {left} is saved; asked to leave by SIGUSR1")


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(
    cluster: Cluster, folder: Path, config: Config, losses: list[float]
) -> None:
    job = train(cluster, config, folder / "killed", *TRAINED_ON_TWO)
    pids = job.pids(2)
    job.at_step(random_step(4))
    os.kill(pids[1], signal.SIGKILL)
    job.until_done()
    assert jobs.losses(job.run_dir) == losses
    node = job.attempts[0].nodes[1]
    assert (job.restarts, [ended.code for ended in job.ends]) == (1, [3, 0])
    assert (job.ends[0].node, job.ends[0].reason) == (node, f"rank 1 on {node}: Killed")
    assert jobs.events(job.run_dir, "resumed")[0]["step"] == job.ends[0].saved_step


def test_a_job_that_always_fails_stops_and_says_why_first(
    cluster: Cluster, failing: Launched
) -> None:
    assert cluster.until_ended(failing.job_id) == "FAILED"
    assert cluster.job(failing.job_id)["ExitCode"] == "3:0"
    first, second, third = (attempt.nodes[0] for attempt in failing.attempts)
    assert first == second != third
    assert cluster.job(failing.job_id)["ExcNodeList"] == first
    said = [line for line in failing.words.splitlines() if line.startswith("tvr launch: ")]
    assert said == [
        f"tvr launch: no good: {first}; starts again in 1 s",
        f"tvr launch: no good: {first}; starts again in 2 s without {first}, which failed 2 times",
        f"tvr launch: no good: {third}; stopped after 3 failures without a new checkpoint"
        " (--max-failures)",
    ]


def test_a_job_that_slurm_takes_off_its_nodes_has_not_failed(
    cluster: Cluster, folder: Path
) -> None:
    # As preemption with PreemptMode=REQUEUE does; the command leaves no word of its end.
    script = 'n=${SLURM_RESTART_COUNT:-0}; touch "$1-$n"; ((n >= 3)) || exec sleep 100'
    began = folder / "it began"
    command = ["bash", "-c", script, "bash", str(began)]
    job = launch(cluster, folder / "taken away", command=command)
    for restart in range(3):
        job.until(
            lambda n=restart: Path(f"{began}-{n}").exists() and job.state == "RUNNING",
            f"attempt {restart}",
        )
        # The second is as with a GraceTime: SIGTERM to ranks, while the job is still said to run.
        how = ["scancel", "--signal=TERM"] if restart == 1 else ["scontrol", "requeue"]
        cluster.run(*how, job.job_id)
    job.until_done()
    assert [(ended.code, ended.node) for ended in job.ends] == [(75, None)] * 3 + [(0, None)]
    assert cluster.job(job.job_id)["ExcNodeList"] == "(null)"


def test_a_job_whose_run_another_one_took_is_over_and_blames_no_node(
    cluster: Cluster, folder: Path
) -> None:
    run_dir = folder / "taken over"
    script = 'mkdir attempts; echo \'{"job": "0", "restart": 0}\' > attempts/000002.json'
    say = 'echo "attempt 1 is over: another one began" >&2; exit 3'
    command = ["bash", "-c", f'cd "$1"; {script}; {say}', "bash", str(run_dir)]
    job = launch(cluster, run_dir, command=command)
    assert cluster.until_ended(job.job_id) == "FAILED"
    assert (job.restarts, [(ended.node, ended.over) for ended in job.ends]) == (0, [(None, True)])
    assert "not started again: another job has taken over the run" in job.words


def test_the_end_of_its_time_leads_to_a_checkpoint_and_to_a_restart(
    expiring: Launched, losses: list[float]
) -> None:
    expiring.until_done()
    # On a busy machine its time may end once more.
    *before, last = [ended.code for ended in expiring.ends]
    assert (set(before), last) == ({75}, 0)
    assert expiring.restarts == len(before)
    assert jobs.losses(expiring.run_dir) == losses


def test_orphans_behind_a_dead_node_daemon_cannot_write(
    cluster: Cluster, orphaned: Launched, losses: list[float]
) -> None:
    run_dir = orphaned.run_dir
    (node,) = orphaned.attempts[0].nodes
    orphans = orphaned.pids(2)
    orphaned.until(lambda: (run_dir / "attempts" / "000002.json").exists(), "a new attempt")
    assert all(is_alive(pid) for pid in orphans)
    for pid in orphans:
        os.kill(pid, signal.SIGCONT)
    until(lambda: not any(is_alive(pid) for pid in orphans), "the orphans end")
    orphaned.until_done()
    assert "attempt 1 at" in orphaned.words
    assert "is over: another one began" in orphaned.words
    assert f"job {orphaned.job_id} is PENDING: not queued again from here" in orphaned.words
    assert jobs.losses(run_dir) == losses
    assert len(list((run_dir / "attempts").iterdir())) == 2
    assert (orphaned.restarts, orphaned.ends[0].node) == (1, node)
    cluster.start_node(node)
    cluster.until_idle(cluster.nodes)


def test_eight_nodes_meet(cluster: Cluster, folder: Path, data: Path) -> None:
    config = tiny_config(
        data, data={"test": None, "test_exchanged": None}, train={"steps": 3, "zero_stage": 1}
    )
    # Nothing stands behind the cluster's GPUs: conftest says DS_ACCELERATOR=cpu, which goes along.
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    options = ("--nodes", "8", "--gpus-per-node", "1", "--cpus-per-rank", "2", "--mem", "100M")
    job = train(cluster, config, folder / "eight", *options, ranks=8)
    job.until_done()
    assert len(jobs.losses(job.run_dir)) == 3
    assert list(job.attempts[0].nodes) == cluster.nodes


def test_an_array_packs_a_data_set_with_one_task_killed(
    cluster: Cluster, folder: Path, data: Path
) -> None:
    out = folder / "packed"
    options = "--layout frames --num-frames 3 --short-side 16 --samples-per-shard 10 --no-words"
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
        # SLURM's number of this task is that of the whole array, too.
        pid = _pack_pid(out, job.job_id)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return bool(killed)

    until(kill, "a task")
    until(lambda: _is_over(cluster, job.job_id), "the array")
    tasks = json.loads((out / "manifest.json").read_text())["shards"]
    assert len(tasks) == 5
    for shard in sorted(data.glob("train/*.tar")):
        assert (out / shard.name).read_bytes() == shard.read_bytes()
    codes = [
        [attempt.ended.code for attempt in Attempts(job.run_dir / "launch", path.stem).read()]
        for path in (job.run_dir / "launch" / "attempts").iterdir()
    ]
    assert sorted(codes) == [[0], [0], [3, 0]]


def test_jobs_are_cancelled_resumed_and_chained(cluster: Cluster, folder: Path) -> None:
    targets, run_dir = folder / "targets", folder / "looked after"
    group = '[{"targets": ["n1:9100"], "labels": {"run": "x"}}]'
    script = f"mkdir -p metrics; echo '{group}' > metrics/n1.json; sleep 60"
    command = ["bash", "-c", f'cd "$1"; {script}', "bash", str(run_dir)]
    first = launch(cluster, run_dir, "--targets", str(targets), command=command)
    until(lambda: [*map(_read, targets.glob("*.json"))] == [json.loads(group)], "its targets")
    refused = subprocess.run(
        [sys.executable, "-m", "tvr.launchers.cli", "launch", "resume", str(run_dir)],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert f"job {first.job_id} of {run_dir} goes on; wait for it" in refused.stderr
    assert tvr("cancel", str(run_dir)) == f"cancelled: {first.job_id}\n"
    assert cluster.until_ended(first.job_id) == "CANCELLED"
    until(lambda: "not queued again from here" in first.words, "the end of its batch shell")
    assert "starts again" not in first.words
    assert list(targets.iterdir()) == []
    second = tvr("resume", str(run_dir)).strip()
    assert f"{second}  " in tvr("status", str(run_dir))
    until(lambda: cluster.job(second)["JobState"] == "RUNNING", "it runs again")
    after = ("--dependency", f"afterany:{second}")
    third = launch(cluster, run_dir, *after, command=["bash", "-c", "exit 0"])
    assert (third.state, cluster.job(third.job_id)["Reason"]) == ("PENDING", "Dependency")
    cluster.run("scancel", second)
    third.until_done()
    assert first.restarts == 0


def test_ranks_run_in_an_image(
    cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What runs an image, but for the image: says how it was called, and runs the rest.
    program = folder / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@"\nuntil [[ $1 == *.sif ]]; do shift; done\nexec "${@:2}"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    image = ["--container", "/images/a b.sif", "--container-runtime", "apptainer"]
    options = (*image, "--container-python", sys.executable, "--container-mounts", "/data:/d")
    job = launch(cluster, folder / "in an image", *options, command=["tvr", "--version"])
    job.until_done()
    said = tvr("logs", str(job.run_dir), "--rank", "0").splitlines()
    assert said[0] == "exec"
    assert f"--bind={job.run_dir}:{job.run_dir}" in said
    assert {"--bind=/data:/d", f"--pwd={os.getcwd()}", "/images/a b.sif"} <= set(said)
    assert said[-1].startswith("tvr ")


@pytest.mark.parametrize("nodelist", ["n[1-3]", "gpu[08-10,12],login", "r[1-2]n[3-4]", "a[9-11]"])
def test_node_lists_are_expanded_as_slurm_does(cluster: Cluster, nodelist: str) -> None:
    assert cluster.run("scontrol", "show", "hostnames", nodelist).split() == expand_nodes(nodelist)


def _has_notice(pid: int) -> bool:
    """Whether SIGUSR1 waits for a process that stands still."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pending = next(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd"))
    return bool(pending >> signal.SIGUSR1 - 1 & 1)


def _read(path: Path) -> object:
    return json.loads(path.read_text())


def _is_over(cluster: Cluster, job_id: str) -> bool:
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
