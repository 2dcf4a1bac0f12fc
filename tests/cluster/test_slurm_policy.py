"""What is decided from how a job ended, and how that is read from srun's words; no cluster."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvr.launchers.job import Job
from tvr.launchers.monitoring.targets import remove_targets, targets_of
from tvr.launchers.restart_policy import Ended, Policy, decide
from tvr.launchers.run_status import (
    ToldFailure,
    notice_for,
    read_progress,
    taken_over,
    told_failure,
)
from tvr.launchers.slurm import commands as slurm
from tvr.launchers.slurm.allocation import allocation
from tvr.launchers.slurm.attempt_log import Attempt, Attempts
from tvr.launchers.slurm.commands import TaskEnd, first_bad_end
from tvr.launchers.slurm.step import ended_as
from tvr.launchers.slurm.task_main import place
from tvr.trainer.errors import Fenced
from tvr.trainer.fencing import begin_attempt

POLICY = Policy(max_failures=3, max_restarts=5, back_off_s=10)
DONE = Ended(code=0, reason="done", node=None, saved_step=9)
FAILED = Ended(code=3, reason="the reason", node=None, saved_step=0)
PREEMPTED = Ended(code=75, reason="told to leave", node=None, saved_step=0)


def at(ended: Ended, step: int, node: str | None = None) -> Ended:
    return replace(ended, saved_step=step, node=node)


@pytest.mark.parametrize(
    ("attempts", "again", "text"),
    [
        ([DONE], False, "done"),
        ([PREEMPTED, FAILED, DONE], False, "done"),
        ([replace(FAILED, code=2)], False, "the reason; not started again: the same line"),
        ([replace(FAILED, over=True)], False, "the reason; not started again: another job has"),
        ([FAILED], True, "the reason; starts again in 10 s"),
        ([FAILED, FAILED], True, "the reason; starts again in 20 s"),
        ([FAILED] * 3, False, "the reason; stopped after 3 failures without a new checkpoint"),
        ([FAILED, FAILED, at(FAILED, 5)], True, "the reason; starts again in 10 s"),
        ([FAILED, PREEMPTED, FAILED], True, "the reason; starts again in 20 s"),
        ([FAILED, FAILED, PREEMPTED], True, "told to leave; starts again"),
        ([PREEMPTED] * 6, False, "told to leave; stopped after 5 restarts (--max-restarts)"),
        ([at(FAILED, n) for n in range(6)], False, "the reason; stopped after 5 restarts"),
    ],
)
def test_decisions(attempts: list[Ended], again: bool, text: str) -> None:
    decision = decide(attempts, POLICY)
    assert (decision.again, decision.code) == (again, attempts[-1].code)
    assert decision.text.startswith(text)


@pytest.mark.parametrize(
    ("nodes", "excluded"),
    [("ab", ()), ("aa", ("a",)), ("aba", ("a",)), ("abab", ("a", "b")), ("a-a", ("a",))],
)
def test_a_node_that_failed_twice_is_left_out(nodes: str, excluded: tuple[str, ...]) -> None:
    attempts = [at(FAILED, step, node) for step, node in enumerate(nodes)]
    attempts = [PREEMPTED if ended.node == "-" else ended for ended in attempts]
    decision = decide(attempts, replace(POLICY, max_failures=9))
    assert decision.exclude == excluded


@given(
    st.lists(st.sampled_from([FAILED, PREEMPTED, at(FAILED, 5), at(PREEMPTED, 5)]), min_size=1),
    st.integers(1, 5),
    st.integers(0, 8),
)
def test_no_job_comes_again_for_ever(attempts: list[Ended], failures: int, restarts: int) -> None:
    policy = Policy(max_failures=failures, max_restarts=restarts, back_off_s=1)
    decision = decide(attempts, policy)
    assert decision.again <= (len(attempts) <= restarts)
    assert decision.again or len(attempts) > min(restarts, failures - 1)
    assert 0 <= decision.wait_s <= 600


@pytest.mark.parametrize(
    ("words", "end", "code"),
    [
        ("srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Terminated", ("n2", 1), None),
        ("x\nsrun: error: n2: tasks 2-3,7: Exited with exit code 75\n", ("n2", 2), 75),
        ("srun: error: Node failure on n3\nsrun: error: n1: task 0: Killed", ("n3", None), None),
        ("srun: launch/slurm: _step_signal: Terminating StepId=7.0", None, None),
        ("srun: error: Timed out waiting for job step to complete", None, None),
    ],
)
def test_the_first_bad_end_is_read_from_srun(
    words: str, end: tuple[str, int | None] | None, code: int | None
) -> None:
    found = first_bad_end(words)
    assert (found and (found.node, found.rank)) == end
    assert (found and found.exit_code) == code


@pytest.mark.parametrize(
    "words", ["Unable to contact slurm controller", "Socket timed out on send/recv operation"]
)
@pytest.mark.parametrize(("refusals", "waited"), [(0, []), (2, [5, 10]), (99, [5, 10, 20])])
def test_a_controller_that_is_away_is_asked_again(
    refusals: int,
    words: str,
    waited: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count, program = tmp_path / "count", tmp_path / "scontrol"
    count.write_text("0")
    program.write_text(
        f"#!/bin/bash\nn=$(< '{count}'); echo $((n + 1)) > '{count}'\n"
        f"((n >= {refusals})) && echo 'NodeName=n1 NodeAddr=10.0.0.1 Port=1' && exit 0\n"
        f"echo 'error: {words}' >&2; exit 1\n"
    )
    program.chmod(0o755)
    waits: list[int] = []
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "WAITS_S", (5, 10, 20))
    monkeypatch.setattr(slurm.time, "sleep", waits.append)
    if refusals < 99:
        assert slurm.node_field("n1", "NodeAddr") == "10.0.0.1"
    else:
        with pytest.raises(ValueError, match=f"scontrol --oneliner: error: {words}"):
            slurm.node_field("n1", "NodeAddr")
    assert waits == waited


def bad(what: str, rank: int | None = 1) -> TaskEnd:
    return TaskEnd(node="n2", rank=rank, what=what)


@pytest.mark.parametrize(
    ("end", "code", "noticed", "expected"),
    [
        (None, 0, True, (0, "done", None)),
        (None, 1, False, (3, "last line", None)),
        (bad("Exited with exit code 75"), 75, True, (75, "last line", None)),
        (bad("Exited with exit code 2"), 2, False, (2, "last line", None)),
        (bad("Exited with exit code 3"), 143, False, (3, "last line", "n2")),
        (bad("Exited with exit code 1"), 1, False, (3, "last line", "n2")),
        (bad("Killed"), 143, True, (3, "rank 1 on n2: Killed", "n2")),
        (
            bad("User defined signal 1"),
            138,
            True,
            (75, "rank 1 on n2: User defined signal 1", None),
        ),
        (
            bad("User defined signal 1"),
            138,
            False,
            (3, "rank 1 on n2: User defined signal 1", "n2"),
        ),
        (bad("Terminated"), 143, False, (75, "rank 1 on n2: Terminated", None)),
        (bad("the node failed", None), 0, False, (3, "node n2: the node failed", "n2")),
        (bad("the node failed", None), 1, False, (3, "node n2: the node failed", "n2")),
    ],
)
def test_how_an_attempt_ended(
    end: TaskEnd | None, code: int, noticed: bool, expected: tuple[int, str, str | None]
) -> None:
    ended = ended_as(end, code=code, said="last line", blamed=None, noticed=noticed, saved_step=7)
    assert (ended.code, ended.reason, ended.node) == expected
    assert ended.saved_step == 7


@pytest.mark.parametrize(
    ("what", "node"),
    [
        ("Exited with exit code 3", "n1"),
        ("Exited with exit code 2", None),
        ("Killed", "n2"),
        ("Terminated", "n2"),
    ],
)
def test_the_node_of_the_rank_that_failed_first_is_blamed(what: str, node: str | None) -> None:
    ended = ended_as(bad(what), code=3, said="a line", blamed="n1", noticed=False, saved_step=0)
    assert ended.node == node


def test_of_several_ends_of_an_attempt_the_first_counts(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path, "17")
    assert attempts.read() == []
    attempts.begin(0, ["n1", "n2"], 5.0)
    attempts.end(0, FAILED)
    attempts.begin(1, ["n3"], 6.0)
    with (tmp_path / "attempts" / "17.jsonl").open("a") as file:
        file.write('{"restart": 0, "code"')  # torn by a crash
    attempts.end(0, DONE)  # by an orphan
    assert attempts.read() == [
        Attempt(restart=0, nodes=("n1", "n2"), began_s=5.0, ended=FAILED),
        Attempt(restart=1, nodes=("n3",), began_s=6.0, ended=None),
    ]


def test_ranks_meet_at_a_port_that_job_and_restart_give() -> None:
    slurms = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_PARTITION": "main",
    }
    first = allocation(slurms)
    again = allocation({**slurms, "SLURM_RESTART_COUNT": "1"})
    assert (first.nodes, first.restart, again.restart) == (("n1", "n2"), 0, 1)
    assert 20000 <= first.port < 32000
    assert first.port == allocation(slurms).port != again.port
    array = {"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "7"}
    assert (first.name, allocation({**slurms, **array}).name) == ("123456", "123456_7")


def test_a_task_is_told_who_it_is() -> None:
    slurms = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_CPUS_PER_TASK": "6",
    }
    ours = place(slurms)
    del ours["PATH"]
    assert ours == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "OMP_NUM_THREADS": "6",
    }
    assert place({**slurms, "OMP_NUM_THREADS": "2"})["OMP_NUM_THREADS"] == "2"


def test_progress_is_read_from_a_log_that_may_be_torn(tmp_path: Path) -> None:
    assert read_progress(tmp_path).saved_step == 0
    assert notice_for(read_progress(tmp_path)) == 300
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
    assert (progress.step, progress.evaluation) == (events[2], events[4])
    assert notice_for(progress) == 160


def test_what_failed_is_told_by_the_newest_file_of_this_attempt(tmp_path: Path) -> None:
    assert told_failure(tmp_path, 0.0) is None
    folder = tmp_path / "failures"
    folder.mkdir()
    for age_s, text in ((50, "old"), (20, "ValueError:\n no"), (10, "")):
        told = {"rank": 1, "host": "n2", "code": 3, "error": text, "of": 0}
        path = folder / f"{age_s}.json"
        path.write_text(json.dumps(told) if text else "")
        os.utime(path, (1000 - age_s, 1000 - age_s))
    assert told_failure(tmp_path, 960.0) == ToldFailure(0, "rank 1 on n2: ValueError: no")
    assert told_failure(tmp_path, 985.0) is None


def job_of(run_dir: Path, folder: Path, *words: str, array: str | None = None) -> Job:
    return Job(
        command=("tvr", "train", *words),
        run_dir=str(run_dir),
        directory=str(run_dir.parent),
        python="python3",
        name="run",
        array=array,
        targets=str(folder),
    )


def test_targets_are_joined_in_one_file(tmp_path: Path) -> None:
    run_dir, folder = tmp_path / "a [run]", tmp_path / "sd"
    job = job_of(run_dir, folder)
    targets = targets_of(job, None, time.time() - 60)
    elsewhere = targets_of(job_of(tmp_path / "elsewhere" / "a [run]", folder), None, 0.0)
    assert targets is not None
    assert elsewhere is not None
    assert elsewhere.path != targets.path
    elsewhere.refresh()
    targets.refresh()
    assert json.loads(targets.path.read_text()) == []
    (run_dir / "metrics").mkdir(parents=True)
    groups = {name: [{"targets": [f"{name}:1"], "labels": {}}] for name in ("n1", "n2", "n3")}
    for name, group in groups.items():
        (run_dir / "metrics" / f"{name}.json").write_text(json.dumps(group))
    os.utime(run_dir / "metrics" / "n3.json", (0, 0))  # of an earlier attempt
    targets.refresh()
    assert json.loads(targets.path.read_text()) == groups["n1"] + groups["n2"]
    targets.remove()
    targets.remove()
    assert list(folder.iterdir()) == [elsewhere.path]


def test_each_task_of_an_array_has_targets_of_its_own(tmp_path: Path) -> None:
    run_dir, folder = tmp_path / "array", tmp_path / "sd"
    job = job_of(run_dir, folder, "--run-dir", "runs/%a", array="0-1")
    for task in ("0", "1"):
        metrics = tmp_path / "runs" / task / "metrics"
        metrics.mkdir(parents=True)
        (metrics / "n1.json").write_text(json.dumps([{"targets": [f"n1:{task}"]}]))
    first, second = (targets_of(job, task, 0.0) for task in ("0", "1"))
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


def test_a_restart_that_comes_late_takes_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    first = begin_attempt(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    third = begin_attempt(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(Fenced, match="restart 1 of job 17 is over before it began"):
        begin_attempt(tmp_path)
    third.check()
    with pytest.raises(Fenced, match="attempt 1 at"):
        first.check()
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # a job of its own, by `tvr launch resume`
    assert begin_attempt(tmp_path).number == 3


def test_a_run_is_another_jobs_once_that_has_begun_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not taken_over(tmp_path, "17", 0.0)
    for job_id, began_s in (("17", 100), ("18", 200)):
        monkeypatch.setenv("SLURM_JOB_ID", job_id)
        attempt = begin_attempt(tmp_path)
        os.utime(tmp_path / "attempts" / f"{attempt.number:06d}.json", (began_s, began_s))
        assert not taken_over(tmp_path, job_id, 0.0)
    assert taken_over(tmp_path, "17", 100.0)
    # One that is tried again later, and does not get as far as that, has failed by itself.
    assert not taken_over(tmp_path, "17", 300.0)
