"""Starts the ranks of a job on this machine through torchrun, and learns how they ended."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tvr.launchers.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE
from tvr.launchers.restart_loop import Ending, run_again
from tvr.launchers.restart_policy import ONCE, Policy
from tvr.launchers.torchrun.rank_exits import RankRecord, has_failed, is_alive, read

# Linux: a signal for the process once its parent is gone, so that a killed launcher leaves no rank.
PR_SET_PDEATHSIG = 1


# Ranks that outlive the first one to fail so long hang: in a collective, or stopped.
GRACE_S = 10.0
POLL_S = 0.2


# How the agents of the nodes find each other: there is one.
ALONE = ("--standalone",)


def run_local(
    command: Sequence[str],
    *,
    ranks: int,
    policy: Policy = ONCE,
    run_dir: Path | None = None,
) -> int:
    """Runs `command` on `ranks` ranks and returns the job's exit code (see `job_exit_code`).

    Starts it again after a failure as `policy` says; `run_dir` is where `tvr train` writes.
    """
    return run_again(lambda: run_once(command, ranks=ranks), policy, run_dir)


def run_once(command: Sequence[str], *, ranks: int, agents: Sequence[str] = ALONE) -> Ending:
    """Runs the ranks of this machine, among those of others that torchrun's `agents` options name.

    SIGINT and SIGTERM reach every rank, and the ranks' answer is waited for (30 s, or what
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT says; then torchrun kills them). Of a command other than
    `tvr ...` only success (0) and failure (3) can be told. Of `tvr ...` the first rank that failed
    is named, and ranks that do not end after it are killed.
    """
    with tempfile.TemporaryDirectory(prefix="tvr-launch-") as folder:
        records, ended = Path(folder, "ranks"), Path(folder, "ended.json")
        line = torchrun_command(
            command,
            ranks=ranks,
            python=sys.executable,
            records=records,
            ended=ended,
            agents=agents,
        )
        environment = rank_environment(os.environ, ranks=ranks, cores=len(os.sched_getaffinity(0)))
        ranks_seen = _Ranks(records)
        torchrun_code, told = _run_passing_signals(line, environment, ranks_seen.look)
        if not is_tvr(command):
            return Ending(code=0 if torchrun_code == 0 else 3, told=told)
        ranks_seen.look()
        codes = [record.code for record in read(records) if record.code is not None]
        code = job_exit_code(codes, torchrun_code=torchrun_code)
        if code == 3 and ranks_seen.first is not None:
            exit_codes = json.loads(ended.read_text()) if ended.exists() else {}
            print(f"tvr launch: {failure_line(ranks_seen.first, exit_codes)}", file=sys.stderr)
        return Ending(code=code, told=told)


def torchrun_command(
    command: Sequence[str],
    *,
    ranks: int,
    python: str,
    records: Path,
    ended: Path,
    agents: Sequence[str] = ALONE,
) -> list[str]:
    """The line that starts the ranks: `tvr ...` by this interpreter, anything else as given."""
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1")
    if not command:
        raise ValueError("the command of the ranks is empty; give one such as `tvr train ...`")
    options = [*agents, f"--nproc-per-node={ranks}"]
    if is_tvr(command):
        agent = [python, "-m", "tvr.launchers.torchrun.quiet_main", str(ended), *options]
        return [*agent, "-m", "tvr.launchers.rank_main", str(records), *command[1:]]
    return [python, "-m", "torch.distributed.run", *options, "--no-python", *command]


def failure_line(first: RankRecord, exit_codes: Mapping[str, int]) -> str:
    """How the first rank to fail ended, as far as it has not said so itself.

    `exit_codes` are torchrun's, by rank.
    """
    who = f"rank {first.rank} (process {first.pid}) on {socket.gethostname()} failed first"
    code = exit_codes.get(str(first.rank)) if first.code is None else first.code
    if code is None:
        return f"{who}, without a word"
    if code < 0:
        return f"{who}: killed by {signal.Signals(-code).name}"
    return f"{who}, with exit code {code}; what it said is above"


def rank_environment(environment: Mapping[str, str], *, ranks: int, cores: int) -> dict[str, str]:
    """The user's environment, with the cores shared out among the ranks unless the user did."""
    ours = dict(environment)
    # torchrun would set 1 and leave the other cores idle.
    ours.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    ours["PATH"] = path_with_scripts(ours.get("PATH", ""))
    return ours


def path_with_scripts(path: str) -> str:
    """PATH with the folder of this interpreter's commands first, unless it is there already."""
    scripts = sysconfig.get_path("scripts")
    folders = path.split(os.pathsep) if path else []
    return path if scripts in folders else os.pathsep.join([scripts, *folders])


def job_exit_code(codes: Sequence[int], *, torchrun_code: int) -> int:
    """One code for all ranks: 0 if all ended well; that of the first to fail if it is one that
    tells what to do (2: correct the line, 75: start again, from a checkpoint); else 3."""
    failures = [code for code in codes if code != 0]
    if not failures:
        return EXIT_DONE if torchrun_code == 0 else EXIT_FAILED
    return failures[0] if failures[0] in (EXIT_USAGE, EXIT_PREEMPTED) else EXIT_FAILED


def die_with_parent(signal_number: int) -> None:
    """Asks the kernel to send this process a signal once its parent is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number)


def is_tvr(command: Sequence[str]) -> bool:
    """Whether the command is ours, to be run by this interpreter."""
    return command[0] == "tvr"


class _Ranks:
    """Notes which rank fails first, and kills what is left of the job some time after that."""

    def __init__(self, records: Path) -> None:
        self._records = records
        self._failed_at = 0.0
        self.first: RankRecord | None = None

    def look(self) -> None:
        found = read(self._records)
        if self.first is None:
            self.first = next(filter(has_failed, found), None)
            self._failed_at = time.monotonic()
        elif time.monotonic() - self._failed_at > GRACE_S:
            for record in found:
                if record.code is None and is_alive(record.pid):
                    os.kill(record.pid, signal.SIGKILL)


def _run_passing_signals(
    line: Sequence[str], environment: Mapping[str, str], look: Callable[[], None]
) -> tuple[int, bool]:
    """torchrun's exit code, and whether a signal was passed on to it."""
    got: list[int] = []
    passed_on = (signal.SIGINT, signal.SIGTERM)
    # A signal between here and the start of torchrun is kept and passed on then.
    before = {
        number: signal.signal(number, lambda told, _: got.append(told)) for number in passed_on
    }
    try:
        # Its own session: a terminal's Ctrl-C then comes once, from us, and not twice.
        process = subprocess.Popen(
            line,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
        )
        pending = list(got)

        def pass_on(number: int, frame: object) -> None:
            got.append(number)
            process.send_signal(number)

        for number in passed_on:
            signal.signal(number, pass_on)
        for number in pending:
            process.send_signal(number)
        while True:
            try:
                return process.wait(POLL_S), bool(got)
            except subprocess.TimeoutExpired:
                look()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
