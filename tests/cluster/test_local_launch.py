"""`tvr launch local`: torchrun's command line, exit codes, and real ranks that get signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from builders.slurm_cluster import until

from tvr.launchers.launch_cli import launch
from tvr.launchers.process import is_running, path_with_scripts
from tvr.launchers.rank_main import run_rank
from tvr.launchers.torchrun.launch import (
    failure_line,
    job_exit_code,
    rank_environment,
    run_local,
    torchrun_command,
)
from tvr.launchers.torchrun.rank_exits import RankRecord, has_failed, read_ranks, record_rank

TORCHRUN = ["/py", "-m", "torch.distributed.run", "--standalone"]
FILES = {"records": Path("/records"), "exit_codes": Path("/exit_codes")}


def test_tvr_runs_with_the_same_interpreter() -> None:
    line = torchrun_command(["tvr", "train", "--run-dir", "a b"], ranks=2, python="/py", **FILES)
    agent = [
        "/py",
        "-m",
        "tvr.launchers.torchrun.quiet_main",
        "/exit_codes",
        "--standalone",
        "--nproc-per-node=2",
    ]
    ranks = ["-m", "tvr.launchers.rank_main", "/records", "train", "--run-dir", "a b"]
    assert line == [*agent, *ranks]


def test_other_commands_run_unchanged() -> None:
    line = torchrun_command(["./x", "--y"], ranks=3, python="/py", **FILES)
    assert line == [*TORCHRUN, "--nproc-per-node=3", "--no-python", "./x", "--y"]


@pytest.mark.parametrize(("command", "ranks"), [(["tvr", "train"], 0), ([], 1)])
def test_zero_ranks_and_empty_commands_are_refused(command: list[str], ranks: int) -> None:
    with pytest.raises(ValueError, match=r"ranks=0|empty"):
        torchrun_command(command, ranks=ranks, python="/py", **FILES)


@pytest.mark.parametrize(("ranks", "cores", "threads"), [(2, 8, "4"), (3, 8, "2"), (4, 2, "1")])
def test_cores_are_divided_among_ranks(ranks: int, cores: int, threads: str) -> None:
    environment = rank_environment({"PATH": "/bin", "X": "1"}, ranks=ranks, cores=cores)
    scripts = sysconfig.get_path("scripts")
    assert environment == {"PATH": f"{scripts}:/bin", "X": "1", "OMP_NUM_THREADS": threads}


def test_thread_count_of_the_user_is_kept() -> None:
    environment = {"OMP_NUM_THREADS": "7"}
    assert rank_environment(environment, ranks=2, cores=2)["OMP_NUM_THREADS"] == "7"
    assert environment == {"OMP_NUM_THREADS": "7"}


def test_script_folder_is_added_to_path_once() -> None:
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
def test_rank_records_its_exit_code(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = tmp_path / "records"

    def main(argv: list[str]) -> int:
        assert read_ranks(records)[0].code is None
        return code

    monkeypatch.setattr("tvr.launchers.rank_main.die_with_parent", lambda *_: None)
    monkeypatch.setattr("tvr.launchers.rank_main.exit_on_notice", lambda: None)
    monkeypatch.setattr("tvr.launchers.rank_main.main", main)
    assert read_ranks(records) == []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert run_rank(records, ["train"]) == code
        record_rank(records, 2, 77)
    pid = os.getpid()
    ends = [RankRecord(rank=rank, pid=pid, code=code) for rank in (1, 0)]
    assert read_ranks(records) == [RankRecord(rank=2, pid=77, code=None), *ends]


def test_rank_that_died_or_exited_with_an_error_has_failed() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    running = RankRecord(rank=0, pid=process.pid, code=None)
    assert not has_failed(running)
    process.kill()
    until(lambda: has_failed(running), "the process is a zombie")
    process.wait()
    assert has_failed(running)
    assert [has_failed(replace(running, code=code)) for code in (0, 3)] == [False, True]


@pytest.mark.parametrize(
    ("code", "exit_codes", "expected"),
    [
        (3, {}, "failed first with exit code 3; see its output above"),
        (None, {"1": 3}, "failed first with exit code 3; see its output above"),
        (None, {"1": -9, "0": 3}, "failed first: killed by SIGKILL"),
        (None, {}, "failed first; its exit code is unknown"),
    ],
)
def test_first_failed_rank_is_named(
    code: int | None, exit_codes: dict[str, int], expected: str
) -> None:
    line = failure_line(RankRecord(rank=1, pid=7, code=code), exit_codes)
    assert line == f"rank 1 (process 7) on {socket.gethostname()} {expected}"


def test_two_ranks_succeed_and_have_their_environment(tmp_path: Path) -> None:
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
def test_failed_ranks_set_the_exit_code(command: list[str], code: int) -> None:
    assert launch(["local", "--ranks", "2", "--", *command]) == code


# A rank of the following tests: records its process ID and waits for a signal.
WAIT = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
def exit_on_signal(number, frame):
    (folder / f"got-{rank}").write_text(str(number))
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, exit_on_signal)
(folder / f"pid-{rank}.part").write_text(str(os.getpid()))
(folder / f"pid-{rank}.part").rename(folder / f"pid-{rank}")
time.sleep(120)
"""


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """A launcher whose two ranks wait for a signal."""

    folder: Path
    launcher: subprocess.Popen[bytes]

    def pids(self) -> list[int]:
        """Process IDs of the ranks, once both have started."""
        files = [self.folder / "pid-0", self.folder / "pid-1"]
        until(
            lambda: all(file.exists() for file in files) or self.launcher.poll() is not None,
            "both ranks have started",
        )
        assert self.launcher.poll() is None
        return [int(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def waiting_jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, WaitingJob]]:
    """One job for each signal, started at the same time."""
    jobs: dict[int, WaitingJob] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
            folder = tmp_path_factory.mktemp(number.name)
            line = [sys.executable, "-m", "tvr.launchers.cli", "launch", "local", "--ranks", "2"]
            line += ["--", sys.executable, _script(folder, WAIT), str(folder)]
            jobs[number] = WaitingJob(folder, subprocess.Popen(line))
        yield jobs
    finally:
        for job in jobs.values():
            job.launcher.kill()
            job.launcher.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_rank(
    number: signal.Signals, waiting_jobs: dict[int, WaitingJob]
) -> None:
    job = waiting_jobs[number]
    pids = job.pids()
    job.launcher.send_signal(number)
    assert job.launcher.wait(60) == 3
    got = {path.name: path.read_text() for path in job.folder.glob("got-*")}
    assert got == {"got-0": str(number.value), "got-1": str(number.value)}
    assert not [pid for pid in pids if is_running(pid)]


def test_killed_launcher_leaves_no_ranks(waiting_jobs: dict[int, WaitingJob]) -> None:
    job = waiting_jobs[signal.SIGKILL]
    pids = job.pids()
    job.launcher.kill()
    job.launcher.wait(60)
    until(lambda: not [pid for pid in pids if is_running(pid)], "the ranks end")


def _script(folder: Path, text: str) -> str:
    path = folder / "rank.py"
    path.write_text(text)
    return str(path)


def test_end_process_flushes_output_and_runs_exit_functions() -> None:
    # A pipe, so that output is buffered until it is flushed.
    code = (
        "import atexit, sys\n"
        "from tvr.launchers.rank_main import end_process\n"
        "atexit.register(print, 'exit function')\n"
        "class Remaining:\n"
        "    def __del__(self): print('finalized')\n"
        "remaining = Remaining()\n"
        "print('output'); print('error', file=sys.stderr)\n"
        "end_process(7)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (7, "error\n")
    assert result.stdout == "output\nexit function\n"
