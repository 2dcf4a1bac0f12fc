"""Runs a job over ssh on the hosts of a DeepSpeed hostfile, for clusters without a batch system.

Every host needs the same folders, and the interpreter at the same path.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tvr.launchers.job import captured_environment
from tvr.launchers.job_values import (
    ALLOWED_IN_COMMANDS,
    COMMAND,
    check_environment,
    check_host,
    check_texts,
)
from tvr.launchers.restart_loop import LaunchExit
from tvr.launchers.torchrun.launch import job_exit_code

HOST_LINE = re.compile(r"(\S+)\s+slots=([0-9]+)")
# BatchMode: ssh fails instead of asking for a password. ServerAlive: the connection to a host that
# has disappeared ends after a minute.
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
SSH_FAILED = 255
# Hosts that still run this long after the first failure are asked to exit.
HOST_GRACE_S = 30.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One line of a hostfile."""

    name: str
    ranks: int


def read_hosts(text: str, source: str) -> list[Host]:
    """Parses a hostfile with one `NAME slots=RANKS` a line and `#` comments.

    Args:
        text: Content of the hostfile.
        source: Name of the file, for error messages.

    Raises:
        ValueError: a line has another form, a host is listed twice, or the file lists no host.
    """
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = HOST_LINE.fullmatch(line)
        if match is None or int(match[2]) < 1 or match[1] in hosts:
            raise ValueError(
                f"{source}, line {number}: {line!r} must be a host, listed once, and its number of"
                " ranks, at least 1, as in `node1 slots=8`"
            )
        name = check_host(match[1], f"{source}, line {number}")
        hosts[name] = Host(name=name, ranks=int(match[2]))
    if not hosts:
        raise ValueError(f"{source} lists no host")
    return list(hosts.values())


def host_command(
    hosts: Sequence[Host],
    index: int,
    command: Sequence[str],
    *,
    address: str,
    port: int,
    environment: Mapping[str, str],
) -> list[str]:
    """Builds the ssh command that starts one host's ranks in this machine's working directory.

    Raises:
        ValueError: a value could not pass the remote shell as it is.
    """
    host = hosts[index]
    check_host(host.name, "hosts")
    check_host(address, "--master-addr")
    check_environment(environment)
    check_texts(command, COMMAND, ALLOWED_IN_COMMANDS)
    check_texts(os.getcwd(), "the working directory")
    rendezvous = [str(index), str(len(hosts)), str(host.ranks), address, str(port)]
    variables = [f"{name}={value}" for name, value in environment.items()]
    remote = ["env", *variables, sys.executable, "-m", "tvr.launchers.ssh.host_main"]
    remote += [*rendezvous, *command]
    return [*SSH, host.name, f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(remote)}"]


def run_on_hosts(
    command: Sequence[str], hosts: Sequence[Host], *, address: str, port: int
) -> LaunchExit:
    """Runs the job once on all hosts. SIGINT and SIGTERM ask the ranks to save and exit.

    Args:
        command: Command of every rank.
        hosts: Hosts of the job.
        address: Host name of the rendezvous.
        port: Port of the rendezvous.
    """
    environment = captured_environment(os.environ)
    lines = [
        host_command(hosts, index, command, address=address, port=port, environment=environment)
        for index in range(len(hosts))
    ]
    signals: list[int] = []
    with _recording_signals(signals):
        # In sessions of their own, ssh processes do not get a terminal's Ctrl-C.
        processes = {
            host.name: subprocess.Popen(line, stdin=subprocess.PIPE, start_new_session=True)
            for host, line in zip(hosts, lines, strict=True)
        }
        codes = _wait(processes, signals)
    for name, code in codes.items():
        if code == SSH_FAILED:
            print(f"tvr launch: ssh to {name} failed", file=sys.stderr)
    code = job_exit_code([*codes.values()], torchrun_code=0)
    return LaunchExit(code=code, signalled=bool(signals))


def _wait(
    processes: Mapping[str, subprocess.Popen[bytes]], signals: Sequence[int]
) -> dict[str, int]:
    """Waits for all hosts and returns their exit codes, in the order of their exits.

    After a signal, or `HOST_GRACE_S` after the first failure, all hosts are asked to exit.
    """
    codes: dict[str, int] = {}
    failed_at: float | None = None
    while len(codes) < len(processes):
        for name, process in processes.items():
            if name not in codes and (code := process.poll()) is not None:
                codes[name] = code
                _request_exit(process)
        if failed_at is None and any(codes.values()):
            failed_at = time.monotonic()
        if signals or (failed_at is not None and time.monotonic() - failed_at > HOST_GRACE_S):
            for process in processes.values():
                _request_exit(process)
        time.sleep(POLL_S)
    return codes


def _request_exit(process: subprocess.Popen[bytes]) -> None:
    """Closes standard input, which `host_main` takes as a request to exit."""
    assert process.stdin is not None
    process.stdin.close()


@contextmanager
def _recording_signals(received: list[int]) -> Iterator[None]:
    recorded = (signal.SIGINT, signal.SIGTERM)
    previous = {
        number: signal.signal(number, lambda got, frame: received.append(got))
        for number in recorded
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
