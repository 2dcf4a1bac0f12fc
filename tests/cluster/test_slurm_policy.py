"""Restart decisions, ends of attempts parsed from srun's output, and target files; no cluster."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvr.launchers.job import (
    Job,
    all_run_dirs,
    from_json,
    job_environment,
    task_run_dir,
    to_json,
)
from tvr.launchers.monitoring.targets import remove_targets, targets_file
from tvr.launchers.restart_policy import AttemptEnd, RestartPolicy, decide_restart
from tvr.launchers.run_status import (
    ReportedFailure,
    is_superseded,
    mark_run,
    notice_seconds,
    read_progress,
    reported_failure,
)
from tvr.launchers.slurm import commands
from tvr.launchers.slurm.allocation import read_allocation
from tvr.launchers.slurm.attempt_log import AttemptLog, JobAttempt
from tvr.launchers.slurm.commands import StepFailure, first_step_failure
from tvr.launchers.slurm.step import attempt_end, refresh_interval_s
from tvr.launchers.slurm.submit import with_measured_notice
from tvr.launchers.slurm.task_main import exit_grace_s, torch_environment
from tvr.trainer.errors import Fenced
from tvr.trainer.fencing import begin_attempt

POLICY = RestartPolicy(max_failures=3, max_restarts=5, back_off_s=10)
DONE = AttemptEnd(code=0, reason="done", node=None, saved_step=9)
FAILED = AttemptEnd(code=3, reason="the reason", node=None, saved_step=0)
PREEMPTED = AttemptEnd(code=75, reason="preempted", node=None, saved_step=0)


def at(end: AttemptEnd, step: int, node: str | None = None) -> AttemptEnd:
    return replace(end, saved_step=step, node=node)


@pytest.mark.parametrize(
    ("attempts", "restart", "message"),
    [
        ([DONE], False, "done"),
        ([PREEMPTED, FAILED, DONE], False, "done"),
        ([replace(FAILED, code=2)], False, "the reason; no restart: the same command"),
        ([replace(FAILED, superseded=True)], False, "the reason; no restart: another job has"),
        ([FAILED], True, "the reason; restarting in 10 s"),
        ([FAILED, FAILED], True, "the reason; restarting in 20 s"),
        ([FAILED] * 3, False, "the reason; stopped after 3 failures without a new checkpoint"),
        ([FAILED, FAILED, at(FAILED, 5)], True, "the reason; restarting in 10 s"),
        ([FAILED, PREEMPTED, FAILED], True, "the reason; restarting in 20 s"),
        ([FAILED, FAILED, PREEMPTED], True, "preempted; restarting"),
        ([PREEMPTED] * 6, False, "preempted; stopped after 5 restarts (--max-restarts)"),
        ([at(FAILED, n) for n in range(6)], False, "the reason; stopped after 5 restarts"),
    ],
)
def test_restart_decisions(attempts: list[AttemptEnd], restart: bool, message: str) -> None:
    decision = decide_restart(attempts, POLICY)
    assert (decision.restart, decision.code) == (restart, attempts[-1].code)
    assert decision.message.startswith(message)


@pytest.mark.parametrize(
    ("nodes", "excluded"),
    [("ab", ()), ("aa", ("a",)), ("aba", ("a",)), ("abab", ("a", "b")), ("a-a", ("a",))],
)
def test_node_that_failed_twice_is_excluded(nodes: str, excluded: tuple[str, ...]) -> None:
    attempts = [at(FAILED, step, node) for step, node in enumerate(nodes)]
    attempts = [PREEMPTED if end.node == "-" else end for end in attempts]
    decision = decide_restart(attempts, replace(POLICY, max_failures=9))
    assert decision.exclude == excluded


@given(
    st.lists(st.sampled_from([FAILED, PREEMPTED, at(FAILED, 5), at(PREEMPTED, 5)]), min_size=1),
    st.integers(1, 5),
    st.integers(0, 8),
)
def test_restarts_are_bounded(attempts: list[AttemptEnd], failures: int, restarts: int) -> None:
    policy = RestartPolicy(max_failures=failures, max_restarts=restarts, back_off_s=1)
    decision = decide_restart(attempts, policy)
    assert decision.restart <= (len(attempts) <= restarts)
    assert decision.restart or len(attempts) > min(restarts, failures - 1)
    assert 0 <= decision.wait_s <= 600


@pytest.mark.parametrize(
    ("errors", "failure", "code"),
    [
        ("srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Terminated", ("n2", 1), None),
        ("x\nsrun: error: n2: tasks 2-3,7: Exited with exit code 75\n", ("n2", 2), 75),
        ("srun: error: Node failure on n3\nsrun: error: n1: task 0: Killed", ("n3", None), None),
        ("srun: launch/slurm: _step_signal: Terminating StepId=7.0", None, None),
        ("srun: error: Timed out waiting for job step to complete", None, None),
    ],
)
def test_first_failure_is_parsed_from_srun(
    errors: str, failure: tuple[str, int | None] | None, code: int | None
) -> None:
    found = first_step_failure(errors)
    assert (found and (found.node, found.rank)) == failure
    assert (found and found.exit_code) == code


@pytest.mark.parametrize(
    "error", ["Unable to contact slurm controller", "Socket timed out on send/recv operation"]
)
@pytest.mark.parametrize(("failures", "waited"), [(0, []), (2, [5, 10]), (99, [5, 10, 20])])
def test_command_is_retried_while_the_controller_is_unreachable(
    failures: int,
    error: str,
    waited: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count, program = tmp_path / "count", tmp_path / "scontrol"
    count.write_text("0")
    program.write_text(
        f"#!/bin/bash\nn=$(< '{count}'); echo $((n + 1)) > '{count}'\n"
        f"((n >= {failures})) && echo 'NodeName=n1 NodeAddr=10.0.0.1 Port=1' && exit 0\n"
        f"echo 'error: {error}' >&2; exit 1\n"
    )
    program.chmod(0o755)
    waits: list[int] = []
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(commands, "RETRY_WAITS_S", (5, 10, 20))
    monkeypatch.setattr(commands.time, "sleep", waits.append)
    if failures < 99:
        assert commands.node_field("n1", "NodeAddr") == "10.0.0.1"
    else:
        with pytest.raises(ValueError, match=f"scontrol --oneliner: error: {error}"):
            commands.node_field("n1", "NodeAddr")
    assert waits == waited


def failure(description: str, rank: int | None = 1) -> StepFailure:
    return StepFailure(node="n2", rank=rank, description=description)


@pytest.mark.parametrize(
    ("step_failure", "code", "noticed", "expected"),
    [
        (None, 0, True, (0, "done", None)),
        (None, 1, False, (3, "last line", None)),
        (failure("Exited with exit code 75"), 75, True, (75, "last line", None)),
        (failure("Exited with exit code 2"), 2, False, (2, "last line", None)),
        (failure("Exited with exit code 3"), 143, False, (3, "last line", "n2")),
        (failure("Exited with exit code 1"), 1, False, (3, "last line", "n2")),
        (failure("Killed"), 143, True, (3, "rank 1 on n2: Killed", "n2")),
        (
            failure("User defined signal 1"),
            138,
            True,
            (75, "rank 1 on n2: User defined signal 1", None),
        ),
        (
            failure("User defined signal 1"),
            138,
            False,
            (3, "rank 1 on n2: User defined signal 1", "n2"),
        ),
        (failure("Terminated"), 143, False, (75, "rank 1 on n2: Terminated", None)),
        (failure("the node failed", None), 0, False, (3, "node n2: the node failed", "n2")),
        (failure("the node failed", None), 1, False, (3, "node n2: the node failed", "n2")),
    ],
)
def test_end_of_an_attempt_is_classified(
    step_failure: StepFailure | None,
    code: int,
    noticed: bool,
    expected: tuple[int, str, str | None],
) -> None:
    end = attempt_end(
        step_failure,
        code=code,
        message="last line",
        reported=False,
        failed_node=None,
        noticed=noticed,
        saved_step=7,
    )
    assert (end.code, end.reason, end.node) == expected
    assert end.saved_step == 7


@pytest.mark.parametrize(
    ("description", "node"),
    [
        ("Exited with exit code 3", "n1"),
        ("Exited with exit code 2", None),
        ("Killed", "n2"),
        ("Terminated", "n2"),
    ],
)
def test_node_of_the_rank_at_fault_is_recorded(description: str, node: str | None) -> None:
    end = attempt_end(
        failure(description),
        code=3,
        message="a line",
        reported=True,
        failed_node="n1",
        noticed=False,
        saved_step=0,
    )
    assert end.node == node


def test_report_without_a_rank_at_fault_excludes_no_node() -> None:
    # All ranks exit with code 3, and some rank exits first: its node is as good as any other.
    ends = [
        attempt_end(
            failure(description),
            code=3,
            message="no rank is behind the others",
            reported=True,
            failed_node=None,
            noticed=False,
            saved_step=0,
        )
        for description in ("Exited with exit code 3", "Terminated")
    ]
    assert [(end.code, end.node) for end in ends] == [(3, None), (3, "n2")]
    decision = decide_restart([ends[0], ends[0]], POLICY)
    assert (decision.restart, decision.exclude) == (True, ())


def test_first_recorded_end_of_an_attempt_counts(tmp_path: Path) -> None:
    attempts = AttemptLog(tmp_path, "17")
    assert attempts.read() == []
    attempts.record_start(0, ["n1", "n2"], 5.0)
    attempts.record_end(0, FAILED)
    attempts.record_start(1, ["n3"], 6.0)
    with (tmp_path / "attempts" / "17.jsonl").open("a") as file:
        file.write('{"restart": 0, "code"')  # cut by a crash
    attempts.record_end(0, DONE)  # by an orphan
    assert attempts.read() == [
        JobAttempt(restart=0, nodes=("n1", "n2"), began_s=5.0, end=FAILED),
        JobAttempt(restart=1, nodes=("n3",), began_s=6.0, end=None),
    ]


def test_port_depends_on_job_and_restart() -> None:
    slurms = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_PARTITION": "main",
    }
    first = read_allocation(slurms)
    second = read_allocation({**slurms, "SLURM_RESTART_COUNT": "1"})
    assert (first.nodes, first.restart, second.restart) == (("n1", "n2"), 0, 1)
    assert 20000 <= first.port < 32000
    assert first.port == read_allocation(slurms).port != second.port
    array = {"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "7"}
    assert (first.full_id, read_allocation({**slurms, **array}).full_id) == ("123456", "123456_7")


def test_task_environment_is_translated_for_torch() -> None:
    slurms = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_CPUS_PER_TASK": "6",
    }
    variables = torch_environment(slurms)
    del variables["PATH"]
    assert variables == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "OMP_NUM_THREADS": "6",
    }
    assert torch_environment({**slurms, "OMP_NUM_THREADS": "2"})["OMP_NUM_THREADS"] == "2"


def test_progress_is_read_from_an_incomplete_log(tmp_path: Path) -> None:
    assert read_progress(tmp_path).saved_step == 0
    assert notice_seconds(read_progress(tmp_path)) == 300
    events = [
        {"event": "step", "step": 1, "loss": 2.0, "step_s": 4.0},
        {"event": "saved", "step": 1, "seconds": 25.5},
        {"event": "step", "step": 2, "loss": 1.0, "step_s": 1.0},
        {"event": "evaluation", "step": 2, "seconds": 100.5},
        {"event": "evaluation", "step": 2},  # of an older version
    ]
    lines = [json.dumps(event) for event in events]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '["no event"]', lines[0][:20]]))
    progress = read_progress(tmp_path)
    assert (progress.saved_step, progress.longest_save_s, progress.longest_step_s) == (1, 25.5, 4.0)
    assert progress.step == events[2]
    assert notice_seconds(progress) == 160


@pytest.mark.parametrize("skew_s", [-7200, 0, 7200])
def test_newest_failure_report_of_the_attempt_is_read(tmp_path: Path, skew_s: float) -> None:
    """Whatever the clock of the file server shows."""
    now = time.time() + skew_s

    def report(name: str, text: str, age_s: float, of: int | None = 0) -> None:
        path = tmp_path / "failures" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        fields = {"rank": 1, "host": "n2", "code": 3, "error": text, "of": of}
        path.write_text(json.dumps(fields) if text else "")
        os.utime(path, (now - age_s, now - age_s))

    assert reported_failure(tmp_path, mark_run(tmp_path)) is None
    report("17-0", "old", 50)
    mark = mark_run(tmp_path)
    assert reported_failure(tmp_path, mark) is None
    report("17-1", "ValueError:\n no", 20)
    report("17-2", "", 10)  # its rank was killed while it wrote
    assert reported_failure(tmp_path, mark) == ReportedFailure(0, "rank 1 on n2: ValueError: no")
    assert reported_failure(tmp_path, mark_run(tmp_path)) is None
    report("17-0", "a stall", 5, of=None)  # the same name again
    assert reported_failure(tmp_path, mark) == ReportedFailure(None, "rank 1 on n2: a stall")


def job_of(run_dir: Path, folder: Path, *options: str, array: str | None = None) -> Job:
    return Job(
        command=("tvr", "train", *options),
        run_dir=str(run_dir),
        directory=str(run_dir.parent),
        python="python3",
        name="run",
        array=array,
        targets=str(folder),
    )


def test_targets_are_merged_into_one_file(tmp_path: Path) -> None:
    run_dir, folder = tmp_path / "a [run]", tmp_path / "sd"
    job = job_of(run_dir, folder)
    (run_dir / "metrics").mkdir(parents=True)
    (run_dir / "metrics" / "n3.json").write_text("[3]")  # from an earlier attempt
    # The clock of the file server is wrong, so no time tells which attempt wrote a file.
    os.utime(run_dir / "metrics" / "n3.json", (time.time() + 7200,) * 2)
    targets = targets_file(job, None)
    elsewhere = targets_file(job_of(tmp_path / "elsewhere" / "a [run]", folder), None)
    assert targets is not None
    assert elsewhere is not None
    assert elsewhere.path != targets.path
    elsewhere.refresh()
    targets.refresh()
    assert json.loads(targets.path.read_text()) == []
    groups = {name: [{"targets": [f"{name}:1"], "labels": {}}] for name in ("n1", "n2")}
    for name, group in groups.items():
        (run_dir / "metrics" / f"{name}.json").write_text(json.dumps(group))
        os.utime(run_dir / "metrics" / f"{name}.json", (0, 0))
    targets.refresh()
    assert json.loads(targets.path.read_text()) == groups["n1"] + groups["n2"]
    targets.remove()
    targets.remove()
    assert list(folder.iterdir()) == [elsewhere.path]


def test_each_array_task_has_its_own_targets_file(tmp_path: Path) -> None:
    run_dir, folder = tmp_path / "array", tmp_path / "sd"
    job = job_of(run_dir, folder, "--run-dir", "runs/%a", array="0-1")
    first, second = (targets_file(job, task) for task in ("0", "1"))
    for task in ("0", "1"):
        metrics = tmp_path / "runs" / task / "metrics"
        metrics.mkdir(parents=True)
        (metrics / "n1.json").write_text(json.dumps([{"targets": [f"n1:{task}"]}]))
    assert first is not None
    assert second is not None
    first.refresh()
    second.refresh()
    assert json.loads(second.path.read_text()) == [{"targets": ["n1:1"]}]
    first.remove()
    assert list(folder.iterdir()) == [second.path]
    first.path.touch()
    remove_targets(job)
    assert list(folder.iterdir()) == []


def test_late_restart_gets_no_attempt_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    first = begin_attempt(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    third = begin_attempt(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(Fenced, match="restart 1 of job 17 starts too late"):
        begin_attempt(tmp_path)
    third.check()
    with pytest.raises(Fenced, match="attempt 1 at"):
        first.check()
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # another job, submitted by `tvr launch resume`
    assert begin_attempt(tmp_path).number == 3


@pytest.mark.parametrize("skew_s", [-7200, 7200])
def test_run_is_superseded_once_a_later_job_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew_s: float
) -> None:
    start = mark_run(tmp_path)
    assert not is_superseded(tmp_path, "17", start)
    for job_id in ("17", "18"):
        monkeypatch.setenv("SLURM_JOB_ID", job_id)
        attempt = begin_attempt(tmp_path)
        shown_s = time.time() + skew_s  # by the clock of the file server
        os.utime(tmp_path / "attempts" / f"{attempt.number:06d}.json", (shown_s, shown_s))
        assert not is_superseded(tmp_path, job_id, start)
    assert is_superseded(tmp_path, "17", start)
    # A later restart of job 17 that fails before it begins an attempt is not superseded.
    assert not is_superseded(tmp_path, "17", mark_run(tmp_path))
    # More attempts than the names have digits for.
    for number in ("999999", "1000000"):
        record = json.dumps({"job": "17" if number == "1000000" else "18"})
        (tmp_path / "attempts" / f"{number}.json").write_text(record)
    assert not is_superseded(tmp_path, "17", start)


def test_only_changed_metrics_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, read = tmp_path / "run" / "metrics", Path.read_text
    targets = targets_file(job_of(tmp_path / "run", tmp_path / "sd"), None)
    assert targets is not None
    metrics.mkdir(parents=True)
    for node in range(5):
        (metrics / f"n{node}.json").write_text(f"[{node}]")
    names: list[str] = []

    def counted(path: Path, *arguments: Any) -> str:
        names.append(path.name)
        return read(path, *arguments)

    monkeypatch.setattr(Path, "read_text", counted)
    for _ in range(3):
        targets.refresh()
    assert names == [f"n{node}.json" for node in range(5)]
    (metrics / "n2.json").write_text("[22]")
    targets.refresh()
    assert names[5:] == ["n2.json"]
    assert json.loads(read(targets.path)) == [0, 1, 22, 3, 4]
    assert refresh_interval_s(1) < 5
    assert 1000 / refresh_interval_s(1000) <= 50


def test_tasks_of_an_array_have_their_own_folders(tmp_path: Path) -> None:
    job = job_of(tmp_path / "array", tmp_path, "--run-dir", "runs/[x]-%a", array="0-2")
    assert task_run_dir(job, "2") == tmp_path / "runs/[x]-2"
    assert all_run_dirs(job) == []
    for task, seconds in ((0, 10.0), (1, 700.0)):
        folder = task_run_dir(job, str(task))
        folder.mkdir(parents=True)
        event = {"event": "saved", "step": 5, "seconds": seconds}
        (folder / "log.jsonl").write_text(json.dumps(event) + "\n")
    assert all_run_dirs(job) == [task_run_dir(job, "0"), task_run_dir(job, "1")]
    assert with_measured_notice(job).notice_s == 730  # of the slowest save of all tasks
    plain = job_of(tmp_path / "launch", tmp_path, "--run-dir", "runs/plain")
    assert all_run_dirs(plain) == [tmp_path / "runs/plain"]


def test_preempted_ranks_wait_longer_in_larger_jobs(tmp_path: Path) -> None:
    for ranks, expected in ((1, 2.0), (40, 2.0), (400, 20.0), (4000, 30.0)):
        assert exit_grace_s({"SLURM_NTASKS": str(ranks)}) == expected
    job = replace(job_of(tmp_path, tmp_path), exit_grace_s=7.5)
    assert job_environment(job)["TVR_EXIT_GRACE_S"] == "7.5"
    assert exit_grace_s({"SLURM_NTASKS": "4000", **job_environment(job)}) == 7.5
    assert from_json(to_json(job)) == job
    assert with_measured_notice(job).notice_s == 306
    large = replace(job, exit_grace_s=None, nodes=100, ranks_per_node=4)
    assert with_measured_notice(large).notice_s == 318
    with pytest.raises(ValueError, match=r"exit_grace_s=-1 must be 0 or more"):
        replace(job, exit_grace_s=-1)


def test_one_command_asks_for_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [f"n{number}" for number in range(300)]
    states = dict.fromkeys(nodes, "State=IDLE BootTime=1 SlurmdStartTime=2")
    calls: list[list[str]] = []

    def run(line: list[str], *arguments: object) -> str:
        calls.append(line)
        return "\n".join(f"NodeName={node} {states[node]}" for node in line[-1].split(","))

    monkeypatch.setattr(commands, "_run", run)
    assert commands.failed_node_since(nodes, 5.0) is None
    states["n271"], states["n298"] = "State=IDLE BootTime=9 SlurmdStartTime=9", "State=DOWN*"
    assert commands.failed_node_since(nodes, 5.0) == "n271"
    assert commands.failed_node_since(nodes, 10.0) == "n298"
    assert len(calls) == 3
