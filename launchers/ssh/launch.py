"""A job on hosts that ssh reaches, listed in a hostfile as DeepSpeed has it; for clusters without
a batch system. Every host has the same folders, and the interpreter at the same place.
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

from tvr.launchers.job import captured
from tvr.launchers.restart_loop import Ending
from tvr.launchers.torchrun.launch import job_exit_code

LINE = re.compile(r"(\S+)\s+slots=(\d+)")
# Nobody is there to type a password.
# And a host that is gone without a word must not be waited for: the connection ends after a minute.
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
SSH_FAILED = 255
# Hosts that outlive the first one to fail so long are told to end.
GRACE_S = 30.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One line of a hostfile."""

    name: str
    ranks: int


def read_hosts(text: str, where: str) -> list[Host]:
    """The hosts of a hostfile: `NAME slots=RANKS` in each line, after `#` comments.

    Raises:
        ValueError: a line is none, a host comes twice, or there is none at all.
    """
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = LINE.fullmatch(line)
        if match is None or int(match[2]) < 1 or match[1] in hosts:
            raise ValueError(
                f"{where}, line {number}: {line!r} must be a host, named once, and its ranks, at"
                " least 1, as in `node1 slots=8`"
            )
        hosts[match[1]] = Host(name=match[1], ranks=int(match[2]))
    if not hosts:
        raise ValueError(f"{where} names no host")
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
    """The line that starts one host's ranks; its environment and folder are this machine's."""
    host = hosts[index]
    place = [str(index), str(len(hosts)), str(host.ranks), address, str(port)]
    variables = [f"{name}={value}" for name, value in environment.items()]
    node = [
        "env",
        *variables,
        sys.executable,
        "-m",
        "tvr.launchers.ssh.host_main",
        *place,
        *command,
    ]
    return [*SSH, host.name, f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(node)}"]


def run_on_hosts(
    command: Sequence[str], hosts: Sequence[Host], *, address: str, port: int
) -> Ending:
    """Runs the job on all hosts until it ends; SIGINT and SIGTERM tell ranks to leave."""
    environment = captured(os.environ)
    lines = [
        host_command(hosts, index, command, address=address, port=port, environment=environment)
        for index in range(len(hosts))
    ]
    told: list[int] = []
    with _noting(told):
        # Their own session: a terminal's Ctrl-C would end them at once.
        processes = {
            host.name: subprocess.Popen(line, stdin=subprocess.PIPE, start_new_session=True)
            for host, line in zip(hosts, lines, strict=True)
        }
        codes = _wait(processes, told)
    for name, code in codes.items():
        if code == SSH_FAILED:
            print(f"tvr launch: ssh to {name} failed", file=sys.stderr)
    return Ending(code=job_exit_code([*codes.values()], torchrun_code=0), told=bool(told))


def _wait(processes: Mapping[str, subprocess.Popen[bytes]], told: Sequence[int]) -> dict[str, int]:
    """The exit codes in the order in which hosts end; once told, or some time after the first
    failure, all are told to leave."""
    codes: dict[str, int] = {}
    failed_at: float | None = None
    while len(codes) < len(processes):
        for name, process in processes.items():
            if name not in codes and (code := process.poll()) is not None:
                codes[name] = code
                _tell(process)
        if failed_at is None and any(codes.values()):
            failed_at = time.monotonic()
        if told or (failed_at is not None and time.monotonic() - failed_at > GRACE_S):
            for process in processes.values():
                _tell(process)
        time.sleep(POLL_S)
    return codes


def _tell(process: subprocess.Popen[bytes]) -> None:
    """To leave, where it still runs."""
    assert process.stdin is not None
    process.stdin.close()


@contextmanager
def _noting(told: list[int]) -> Iterator[None]:
    passed_on = (signal.SIGINT, signal.SIGTERM)
    before = {
        number: signal.signal(number, lambda got, frame: told.append(got)) for number in passed_on
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
