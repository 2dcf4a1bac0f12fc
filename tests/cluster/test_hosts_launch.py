"""`tvr launch deepspeed` with a fake ssh on this machine, and restarts without a cluster."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from builders.slurm_cluster import free_ports, until

from tvr.launchers import restart_loop
from tvr.launchers.launch_cli import launch
from tvr.launchers.process import is_running
from tvr.launchers.restart_loop import LaunchExit, run_with_restarts
from tvr.launchers.restart_policy import RestartPolicy
from tvr.launchers.ssh.launch import Host, host_command, read_hosts

# Records the host, and runs the command as a remote shell would: in another folder.
FAKE_SSH = """\
#!/bin/bash
[[ $1 == -o && $2 == BatchMode=yes && $7 != away ]] || exit 255
echo "$7" >> {calls}
cd / && exec env -i /bin/sh -c "$8"
"""

# A rank that records its environment and waits for SIGTERM.
WAIT = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
def exit_on_signal(number, frame):
    (folder / f"got-{rank}").write_text(str(number))
    sys.exit(0)
signal.signal(signal.SIGTERM, exit_on_signal)
text = " ".join(os.environ[key] for key in ("LOCAL_RANK", "WORLD_SIZE", "NCCL_DEBUG"))
(folder / f"part-{rank}").write_text(f"{os.getpid()} {text} {os.getcwd()}")
(folder / f"part-{rank}").rename(folder / f"rank-{rank}")
time.sleep(0 if "exit" in sys.argv else 120)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with a hostfile of two hosts and a fake ssh in PATH; one of its folders is current."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(FAKE_SSH.format(calls=shlex.quote(str(tmp_path / "calls"))))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("NCCL_DEBUG", "it's on")
    (tmp_path / "hosts").write_text("one slots=1\n\n# later: two slots=8\ntwo slots=1 # a spare\n")
    (tmp_path / "rank.py").write_text(WAIT)
    here = tmp_path / 'it\'s "here"'
    here.mkdir()
    monkeypatch.chdir(here)
    return tmp_path


def launch_arguments(folder: Path, *command: str) -> list[str]:
    hosts = ["--hostfile", str(folder / "hosts"), "--master-addr", "127.0.0.1"]
    return ["deepspeed", *hosts, "--master-port", str(free_ports(1)[0]), "--", *command]


def rank_files(folder: Path) -> list[list[str]]:
    return [path.read_text().split(" ", 4) for path in sorted(folder.glob("rank-*"))]


def test_ranks_on_two_hosts_have_their_environment(folder: Path) -> None:
    command = [sys.executable, str(folder / "rank.py"), str(folder), "exit"]
    assert launch(launch_arguments(folder, *command)) == 0
    assert sorted((folder / "calls").read_text().split()) == ["one", "two"]
    environments = [" ".join(fields[1:]) for fields in rank_files(folder)]
    assert environments == [f"0 2 it's on {os.getcwd()}"] * 2


def test_signal_reaches_the_ranks_of_all_hosts(folder: Path) -> None:
    command = launch_arguments(folder, sys.executable, str(folder / "rank.py"), str(folder))
    job = subprocess.Popen([sys.executable, "-m", "tvr.launchers.cli", "launch", *command])
    try:
        until(lambda: len(rank_files(folder)) == 2, "both ranks have started")
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 3
    finally:
        job.kill()
        job.wait()
    got = {path.name: path.read_text() for path in folder.glob("got-*")}
    assert got == {"got-0": str(signal.SIGTERM.value), "got-1": str(signal.SIGTERM.value)}
    assert not [pid for pid, *_ in rank_files(folder) if is_running(int(pid))]


def test_unreachable_host_is_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "hosts").write_text("away slots=1\n")
    assert launch(launch_arguments(folder, "tvr", "train")) == 3
    assert "tvr launch: ssh to away failed" in capfd.readouterr().err


def test_exit_code_is_returned(folder: Path) -> None:
    (folder / "hosts").write_text("one slots=1\n")
    assert launch(launch_arguments(folder, "tvr", "nonsense")) == 2


def test_arguments_survive_the_remote_shell(folder: Path) -> None:
    hosts = [Host(name="one", ranks=2), Host(name="two", ranks=3)]
    line = host_command(
        hosts, 1, ["tvr", "a b", "it's", "$x"], address="one", port=7, environment={"A": "b c"}
    )
    assert line[:3] == ["ssh", "-o", "BatchMode=yes"]
    assert any(word.startswith("ServerAliveInterval=") for word in line)
    remote = shlex.split(line[-1])
    assert line[-2] == "two"
    assert remote[:5] == ["cd", os.getcwd(), "&&", "exec", "env"]
    module = remote.index("tvr.launchers.ssh.host_main")
    assert remote[5] == "A=b c"
    assert remote[module + 1 :] == ["1", "2", "3", "one", "7", "tvr", "a b", "it's", "$x"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("one", r"hosts, line 1: 'one' must be a host"),
        ("one slots=1\ntwo slots=0", r"line 2: 'two slots=0' must"),
        ("one slots=1\none slots=1", r"line 2: 'one slots=1' must be a host, listed once"),
        ("# none", r"hosts lists no host"),
    ],
)
def test_invalid_hostfiles_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_hosts(text, source="hosts")


def test_missing_hostfile_exits_with_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "hosts").unlink()
    assert launch(launch_arguments(folder, "tvr", "train")) == 2
    assert "hosts: No such file or directory" in capsys.readouterr().err


def test_local_job_restarts_until_it_succeeds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = f"n=$(cat '{tmp_path}/n'); echo $((n + 1)) > '{tmp_path}/n'; exit $((n < 2))"
    (tmp_path / "n").write_text("1")
    options = ["--ranks", "1", "--max-failures", "2", "--back-off", "0"]
    assert launch(["local", *options, "--", "bash", "-c", script]) == 0
    assert (tmp_path / "n").read_text() == "3\n"
    assert "tvr launch: job failed with exit code 3; restarting\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("exits", "code", "starts", "waits"),
    [
        ([(3, False)] * 5, 3, 3, [5, 10]),
        ([(3, False), (0, False)], 0, 2, [5]),
        ([(3, True)], 3, 1, []),
        ([(75, False)], 75, 1, []),
        ([(2, False)], 2, 1, []),
    ],
)
def test_restarts_without_a_cluster(
    exits: Sequence[tuple[int, bool]],
    code: int,
    starts: int,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(restart_loop.time, "sleep", waited.append)
    remaining = [LaunchExit(code=code, signalled=signalled) for code, signalled in exits]
    policy = RestartPolicy(max_failures=3, back_off_s=5)
    assert run_with_restarts(lambda: remaining.pop(0), policy, None) == code
    assert (len(exits) - len(remaining), waited) == (starts, waits)
