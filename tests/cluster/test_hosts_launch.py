"""`tvr launch deepspeed` with an ssh that runs on this machine, and restarts without a cluster."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from builders.slurm_cluster import free_ports

from tvr.launchers import restart_loop as again
from tvr.launchers.launch_cli import launch
from tvr.launchers.restart_loop import Ending, run_again
from tvr.launchers.restart_policy import Policy
from tvr.launchers.ssh.launch import Host, host_command, read_hosts
from tvr.launchers.torchrun.rank_exits import is_alive

# Says which host it was to reach, and runs the line as a shell there would: in another folder.
FAKE_SSH = """\
#!/bin/bash
[[ $1 == -o && $2 == BatchMode=yes && $7 != away ]] || exit 255
echo "$7" >> {asked}
cd / && exec env -i /bin/sh -c "$8"
"""

# What a rank does: says who it is and waits to be told to end.
WAIT = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
def leave(number, frame):
    (folder / f"got-{rank}").write_text(str(number))
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
text = " ".join(os.environ[key] for key in ("LOCAL_RANK", "WORLD_SIZE", "NCCL_DEBUG"))
(folder / f"part-{rank}").write_text(f"{os.getpid()} {text} {os.getcwd()}")
(folder / f"part-{rank}").rename(folder / f"rank-{rank}")
time.sleep(0 if "at once" in sys.argv else 120)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two hosts, with an ssh first in PATH; the current one."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(FAKE_SSH.format(asked=shlex.quote(str(tmp_path / "asked"))))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("NCCL_DEBUG", "it's on")
    (tmp_path / "hosts").write_text("one slots=1\n\n# later: two slots=8\ntwo slots=1 # a spare\n")
    (tmp_path / "rank.py").write_text(WAIT)
    here = tmp_path / 'it\'s "here"'
    here.mkdir()
    monkeypatch.chdir(here)
    return tmp_path


def line(folder: Path, *command: str) -> list[str]:
    hosts = ["--hostfile", str(folder / "hosts"), "--master-addr", "127.0.0.1"]
    return ["deepspeed", *hosts, "--master-port", str(free_ports(1)[0]), "--", *command]


def ranks_of(folder: Path) -> list[list[str]]:
    return [path.read_text().split(" ", 4) for path in sorted(folder.glob("rank-*"))]


def test_ranks_on_two_hosts_know_who_they_are(folder: Path) -> None:
    command = [sys.executable, str(folder / "rank.py"), str(folder), "at once"]
    assert launch(line(folder, *command)) == 0
    assert sorted((folder / "asked").read_text().split()) == ["one", "two"]
    known = [" ".join(words[1:]) for words in ranks_of(folder)]
    assert known == [f"0 2 it's on {os.getcwd()}"] * 2


def test_being_told_to_end_reaches_the_ranks_of_all_hosts(folder: Path) -> None:
    command = line(folder, sys.executable, str(folder / "rank.py"), str(folder))
    job = subprocess.Popen([sys.executable, "-m", "tvr.launchers.cli", "launch", *command])
    try:
        until(lambda: len(ranks_of(folder)) == 2)
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 3
    finally:
        job.kill()
        job.wait()
    got = {path.name: path.read_text() for path in folder.glob("got-*")}
    assert got == {"got-0": str(signal.SIGTERM.value), "got-1": str(signal.SIGTERM.value)}
    assert not [pid for pid, *_ in ranks_of(folder) if is_alive(int(pid))]


def test_a_host_out_of_reach_is_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "hosts").write_text("away slots=1\n")
    assert launch(line(folder, "tvr", "train")) == 3
    assert "tvr launch: ssh to away failed" in capfd.readouterr().err


def test_the_exit_code_comes_back(folder: Path) -> None:
    (folder / "hosts").write_text("one slots=1\n")
    assert launch(line(folder, "tvr", "nonsense")) == 2


def test_words_survive_the_shell_on_the_other_side(folder: Path) -> None:
    hosts = [Host(name="one", ranks=2), Host(name="two", ranks=3)]
    words = host_command(
        hosts, 1, ["tvr", "a b", "it's", "$x"], address="one", port=7, environment={"A": "b c"}
    )
    assert words[:3] == ["ssh", "-o", "BatchMode=yes"]
    assert any(word.startswith("ServerAliveInterval=") for word in words)
    there = shlex.split(words[-1])
    assert words[-2] == "two"
    assert there[:5] == ["cd", os.getcwd(), "&&", "exec", "env"]
    module = there.index("tvr.launchers.ssh.host_main")
    assert there[5] == "A=b c"
    assert there[module + 1 :] == ["1", "2", "3", "one", "7", "tvr", "a b", "it's", "$x"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("one", r"hosts, line 1: 'one' must be a host"),
        ("one slots=1\ntwo slots=0", r"line 2: 'two slots=0' must"),
        ("one slots=1\none slots=1", r"line 2: 'one slots=1' must be a host, named once"),
        ("# none", r"hosts names no host"),
    ],
)
def test_bad_hostfiles_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_hosts(text, where="hosts")


def test_a_missing_hostfile_ends_with_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "hosts").unlink()
    assert launch(line(folder, "tvr", "train")) == 2
    assert "hosts: No such file or directory" in capsys.readouterr().err


def test_a_local_job_starts_again_until_it_is_done(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = f"n=$(cat '{tmp_path}/n'); echo $((n + 1)) > '{tmp_path}/n'; exit $((n < 2))"
    (tmp_path / "n").write_text("1")
    options = ["--ranks", "1", "--max-failures", "2", "--back-off", "0"]
    assert launch(["local", *options, "--", "bash", "-c", script]) == 0
    assert (tmp_path / "n").read_text() == "3\n"
    assert "tvr launch: it failed with exit code 3; starts again\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("endings", "code", "starts", "waits"),
    [
        ([(3, False)] * 5, 3, 3, [5, 10]),
        ([(3, False), (0, False)], 0, 2, [5]),
        ([(3, True)], 3, 1, []),
        ([(75, False)], 75, 1, []),
        ([(2, False)], 2, 1, []),
    ],
)
def test_restarts_on_this_machine(
    endings: Sequence[tuple[int, bool]],
    code: int,
    starts: int,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(again.time, "sleep", waited.append)
    left = [Ending(code=code, told=told) for code, told in endings]
    policy = Policy(max_failures=3, back_off_s=5)
    assert run_again(lambda: left.pop(0), policy, None) == code
    assert (len(endings) - len(left), waited) == (starts, waits)


def until(done: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"not so after {timeout_s} s"
        time.sleep(0.05)
