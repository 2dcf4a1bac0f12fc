"""The local launcher: its command line as text, its exit codes, and real ranks under signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tvr.launchers.launch_cli import launch
from tvr.launchers.rank_main import run_rank
from tvr.launchers.torchrun.launch import (
    failure_line,
    job_exit_code,
    path_with_scripts,
    rank_environment,
    run_local,
    torchrun_command,
)
from tvr.launchers.torchrun.rank_exits import RankRecord, has_failed, is_alive, note, read

TORCHRUN = ["/py", "-m", "torch.distributed.run", "--standalone"]
FILES = {"records": Path("/records"), "ended": Path("/ended")}


def test_tvr_runs_by_the_same_interpreter() -> None:
    line = torchrun_command(["tvr", "train", "--run-dir", "a b"], ranks=2, python="/py", **FILES)
    agent = [
        "/py",
        "-m",
        "tvr.launchers.torchrun.quiet_main",
        "/ended",
        "--standalone",
        "--nproc-per-node=2",
    ]
    ranks = ["-m", "tvr.launchers.rank_main", "/records", "train", "--run-dir", "a b"]
    assert line == [*agent, *ranks]


def test_another_command_runs_as_given() -> None:
    line = torchrun_command(["./x", "--y"], ranks=3, python="/py", **FILES)
    assert line == [*TORCHRUN, "--nproc-per-node=3", "--no-python", "./x", "--y"]


@pytest.mark.parametrize(("command", "ranks"), [(["tvr", "train"], 0), ([], 1)])
def test_refuses_no_ranks_and_no_command(command: list[str], ranks: int) -> None:
    with pytest.raises(ValueError, match=r"ranks=0|empty"):
        torchrun_command(command, ranks=ranks, python="/py", **FILES)


@pytest.mark.parametrize(("ranks", "cores", "threads"), [(2, 8, "4"), (3, 8, "2"), (4, 2, "1")])
def test_cores_are_shared_out(ranks: int, cores: int, threads: str) -> None:
    ours = rank_environment({"PATH": "/bin", "X": "1"}, ranks=ranks, cores=cores)
    scripts = sysconfig.get_path("scripts")
    assert ours == {"PATH": f"{scripts}:/bin", "X": "1", "OMP_NUM_THREADS": threads}


def test_the_users_thread_count_is_kept() -> None:
    users = {"OMP_NUM_THREADS": "7"}
    assert rank_environment(users, ranks=2, cores=2)["OMP_NUM_THREADS"] == "7"
    assert users == {"OMP_NUM_THREADS": "7"}


def test_path_gains_the_scripts_once() -> None:
    once = path_with_scripts("/bin")
    assert path_with_scripts(once) == once
    assert path_with_scripts("") == sysconfig.get_path("scripts")


@pytest.mark.parametrize(
    ("codes", "torchrun_code", "job_code"),
    [
        ([0, 0], 0, 0),
        ([0, 0], 1, 3),
        ([2, 2], 1, 2),
        ([2], 1, 2),
        ([3], 1, 3),
        ([3, 2], 1, 3),
        ([], 1, 3),
        ([0, 1], 1, 3),
    ],
)
def test_job_exit_code(codes: list[int], torchrun_code: int, job_code: int) -> None:
    assert job_exit_code(codes, torchrun_code=torchrun_code) == job_code


@pytest.mark.parametrize("code", [0, 2, 3])
def test_a_rank_writes_its_code_down(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = tmp_path / "records"

    def main(argv: list[str]) -> int:
        assert read(records)[0].code is None
        return code

    monkeypatch.setattr("tvr.launchers.rank_main.die_with_parent", lambda number: None)
    monkeypatch.setattr("tvr.launchers.rank_main.leave_when_told", lambda: None)
    monkeypatch.setattr("tvr.launchers.rank_main.main", main)
    assert read(records) == []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert run_rank(records, ["train"]) == code
        note(records, 2, 77)
    pid = os.getpid()
    ends = [RankRecord(rank=rank, pid=pid, code=code) for rank in (1, 0)]
    assert read(records) == [RankRecord(rank=2, pid=77, code=None), *ends]


def test_a_rank_has_failed_that_is_gone_or_ended_otherwise_than_well() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    running = RankRecord(rank=0, pid=process.pid, code=None)
    assert not has_failed(running)
    process.kill()
    _until(lambda: has_failed(running))  # not waited for yet
    process.wait()
    assert has_failed(running)
    assert [has_failed(replace(running, code=code)) for code in (0, 3)] == [False, True]


@pytest.mark.parametrize(
    ("code", "exit_codes", "said"),
    [
        (3, {}, "failed first, with exit code 3; what it said is above"),
        (None, {"1": 3}, "failed first, with exit code 3; what it said is above"),
        (None, {"1": -9, "0": 3}, "failed first: killed by SIGKILL"),
        (None, {}, "failed first, without a word"),
    ],
)
def test_the_first_rank_to_fail_is_named(
    code: int | None, exit_codes: dict[str, int], said: str
) -> None:
    line = failure_line(RankRecord(rank=1, pid=7, code=code), exit_codes)
    assert line == f"rank 1 (process 7) on {socket.gethostname()} {said}"


def test_two_ranks_end_well_and_know_who_they_are(tmp_path: Path) -> None:
    script = _script(
        tmp_path,
        "import os, pathlib, sys\n"
        "keys = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')\n"
        "text = ' '.join(os.environ[key] for key in keys)\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(text)\n",
    )
    out = tmp_path / "folder with spaces"
    out.mkdir()
    assert run_local([sys.executable, script, str(out)], ranks=2) == 0
    assert {file.name: file.read_text() for file in out.iterdir()} == {"0": "0 0 2", "1": "1 1 2"}


@pytest.mark.parametrize(
    ("command", "code"), [(["tvr", "nonsense"], 2), ([sys.executable, "-c", "exit(75)"], 3)]
)
def test_failing_ranks_give_the_job_its_code(command: list[str], code: int) -> None:
    assert launch(["local", "--ranks", "2", "--", *command]) == code


# What a rank of the next tests does: says who it is, then waits to be told to end.
WAIT = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
def leave(number, frame):
    (folder / f"got-{rank}").write_text(str(number))
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, leave)
(folder / f"pid-{rank}.part").write_text(str(os.getpid()))
(folder / f"pid-{rank}.part").rename(folder / f"pid-{rank}")
time.sleep(120)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_rank(number: signal.Signals, tmp_path: Path) -> None:
    launcher, pids = _start_waiting_ranks(tmp_path)
    launcher.send_signal(number)
    assert launcher.wait(60) == 3
    got = {path.name: path.read_text() for path in tmp_path.glob("got-*")}
    assert got == {"got-0": str(number.value), "got-1": str(number.value)}
    assert not [pid for pid in pids if is_alive(pid)]


def test_a_killed_launcher_leaves_no_rank_behind(tmp_path: Path) -> None:
    launcher, pids = _start_waiting_ranks(tmp_path)
    launcher.kill()
    launcher.wait(60)
    _until(lambda: not [pid for pid in pids if is_alive(pid)])


def _start_waiting_ranks(folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    line = ["--ranks", "2", "--", sys.executable, _script(folder, WAIT), str(folder)]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "tvr.launchers.cli", "launch", "local", *line]
    )
    files = [folder / "pid-0", folder / "pid-1"]
    try:
        _until(lambda: all(file.exists() for file in files) or launcher.poll() is not None)
        assert launcher.poll() is None
    except BaseException:
        launcher.kill()
        launcher.wait()
        raise
    return launcher, [int(file.read_text()) for file in files]


def _script(folder: Path, text: str) -> str:
    path = folder / "rank.py"
    path.write_text(text)
    return str(path)


def _until(done: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so after {timeout_s} s")
        time.sleep(0.05)


def test_a_process_ends_with_its_code_its_output_and_its_exit_functions() -> None:
    # A pipe, so that output is held back until it is flushed.
    code = (
        "import atexit, sys\n"
        "from tvr.launchers.rank_main import end_process\n"
        "atexit.register(print, 'exit function')\n"
        "class Left:\n"
        "    def __del__(self): print('taken down')\n"
        "left = Left()\n"
        "print('said'); print('error', file=sys.stderr)\n"
        "end_process(7)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (7, "error\n")
    assert ended.stdout == "said\nexit function\n"
