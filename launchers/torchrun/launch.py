"""Runs the ranks of a job on this machine through torchrun, and derives the job's exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tvr.launchers.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE
from tvr.launchers.host_limits import host_cpus
from tvr.launchers.process import (
    child_set_up,
    is_running,
    is_tvr_command,
    path_with_scripts,
)
from tvr.launchers.restart_loop import LaunchExit, run_with_restarts
from tvr.launchers.restart_policy import NO_RESTARTS, RestartPolicy
from tvr.launchers.torchrun.rank_exits import RankRecord, has_failed, read_ranks

# Ranks that still run this long after the first failure hang in a collective, or are stopped.
RANK_GRACE_S = 10.0
POLL_S = 0.2

# torchrun's rendezvous options of a job on one machine.
STANDALONE = ("--standalone",)


def run_local(
    command: Sequence[str],
    *,
    ranks: int,
    policy: RestartPolicy = NO_RESTARTS,
    run_dir: Path | None = None,
) -> int:
    """Runs `command` on `ranks` ranks of this machine, with restarts.

    Args:
        command: `tvr ...`, or any other command.
        ranks: Number of processes.
        policy: Restart budget.
        run_dir: Run folder of `tvr train`, read to decide about restarts.

    Returns:
        The job's exit code, see `job_exit_code`.
    """
    return run_with_restarts(lambda: run_once(command, ranks=ranks), policy, run_dir)


def run_once(
    command: Sequence[str], *, ranks: int, rendezvous: Sequence[str] = STANDALONE
) -> LaunchExit:
    """Runs this machine's ranks once.

    SIGINT and SIGTERM are forwarded to every rank. torchrun kills ranks that do not exit within
    30 s, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT. For `tvr ...`, the first failed rank is named on
    stderr, and ranks that outlive it by `RANK_GRACE_S` are killed. For any other command, the exit
    code is 0 or 3.

    Args:
        command: `tvr ...`, or any other command.
        ranks: Number of processes on this machine.
        rendezvous: torchrun's options that connect this machine with others.
    """
    with tempfile.TemporaryDirectory(prefix="tvr-launch-") as folder:
        records, exit_codes = Path(folder, "ranks"), Path(folder, "exit_codes.json")
        line = torchrun_command(
            command,
            ranks=ranks,
            python=sys.executable,
            records=records,
            exit_codes=exit_codes,
            rendezvous=rendezvous,
        )
        environment = rank_environment(os.environ, ranks=ranks, cores=host_cpus().usable)
        monitor = _RankMonitor(records)
        torchrun_code, signalled = _run_forwarding_signals(line, environment, monitor.poll)
        if not is_tvr_command(command):
            code = EXIT_DONE if torchrun_code == 0 else EXIT_FAILED
            return LaunchExit(code=code, signalled=signalled)
        monitor.poll()
        codes = [record.code for record in read_ranks(records) if record.code is not None]
        code = job_exit_code(codes, torchrun_code=torchrun_code)
        if code == EXIT_FAILED and monitor.first_failure is not None:
            by_rank = json.loads(exit_codes.read_text()) if exit_codes.exists() else {}
            print(f"tvr launch: {failure_line(monitor.first_failure, by_rank)}", file=sys.stderr)
        return LaunchExit(code=code, signalled=signalled)


def torchrun_command(
    command: Sequence[str],
    *,
    ranks: int,
    python: str,
    records: Path,
    exit_codes: Path,
    rendezvous: Sequence[str] = STANDALONE,
) -> list[str]:
    """Builds the command line that starts the ranks.

    Args:
        command: `tvr ...` runs with the interpreter `python`; any other command runs as given.
        ranks: Number of processes on this machine.
        python: Interpreter.
        records: File of the ranks' start and exit records, see `rank_exits`.
        exit_codes: File for torchrun's exit codes, see `quiet_main`.
        rendezvous: torchrun's options that connect this machine with others.

    Raises:
        ValueError: `ranks` is below 1, or the command is empty.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1")
    if not command:
        raise ValueError("the ranks' command is empty; give one such as `tvr train ...`")
    options = [*rendezvous, f"--nproc-per-node={ranks}"]
    if is_tvr_command(command):
        agent = [python, "-m", "tvr.launchers.torchrun.quiet_main", str(exit_codes), *options]
        return [*agent, "-m", "tvr.launchers.rank_main", str(records), *command[1:]]
    return [python, "-m", "torch.distributed.run", *options, "--no-python", *command]


def failure_line(first: RankRecord, exit_codes: Mapping[str, int]) -> str:
    """Describes how the first failed rank ended.

    Args:
        first: Record of that rank.
        exit_codes: torchrun's exit codes by rank, for a rank that recorded none.
    """
    rank = f"rank {first.rank} (process {first.pid}) on {socket.gethostname()} failed first"
    code = exit_codes.get(str(first.rank)) if first.code is None else first.code
    if code is None:
        return f"{rank}; its exit code is unknown"
    if code < 0:
        return f"{rank}: killed by {signal.Signals(-code).name}"
    return f"{rank} with exit code {code}; see its output above"


def rank_environment(environment: Mapping[str, str], *, ranks: int, cores: int) -> dict[str, str]:
    """Copies an environment and divides the cores among the ranks, unless the user has done so."""
    variables = dict(environment)
    # torchrun would set 1 thread and leave the other cores idle.
    variables.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    variables["PATH"] = path_with_scripts(variables.get("PATH", ""))
    return variables


def job_exit_code(codes: Sequence[int], *, torchrun_code: int) -> int:
    """Combines the ranks' exit codes, in the order of their exits.

    Returns:
        0 if every rank succeeded. Otherwise the first failure's code if it is 2 (usage error) or 75
        (preempted, checkpoint saved), and 3 for any other.
    """
    failures = [code for code in codes if code != 0]
    if not failures:
        return EXIT_DONE if torchrun_code == 0 else EXIT_FAILED
    return failures[0] if failures[0] in (EXIT_USAGE, EXIT_PREEMPTED) else EXIT_FAILED


class _RankMonitor:
    """Finds the first failed rank, and kills the ranks that outlive it by `RANK_GRACE_S`."""

    def __init__(self, records: Path) -> None:
        self._records = records
        self._failed_at = 0.0
        self.first_failure: RankRecord | None = None

    def poll(self) -> None:
        ranks = read_ranks(self._records)
        if self.first_failure is None:
            self.first_failure = next(filter(has_failed, ranks), None)
            self._failed_at = time.monotonic()
        elif time.monotonic() - self._failed_at > RANK_GRACE_S:
            for record in ranks:
                if record.code is None and is_running(record.pid):
                    os.kill(record.pid, signal.SIGKILL)


def _run_forwarding_signals(
    line: Sequence[str], environment: Mapping[str, str], poll: Callable[[], None]
) -> tuple[int, bool]:
    """Returns torchrun's exit code, and whether a signal was forwarded to it."""
    received: list[int] = []
    forwarded = (signal.SIGINT, signal.SIGTERM)
    # A signal that arrives before torchrun has started is forwarded once it has.
    previous = {
        number: signal.signal(number, lambda got, frame: received.append(got))
        for number in forwarded
    }
    try:
        # In a session of its own, torchrun gets a terminal's Ctrl-C from this process only.
        process = subprocess.Popen(
            line,
            env=environment,
            start_new_session=True,
            preexec_fn=child_set_up(signal.SIGTERM),
        )
        pending = list(received)

        def forward(number: int, frame: object) -> None:
            received.append(number)
            process.send_signal(number)

        for number in forwarded:
            signal.signal(number, forward)
        for number in pending:
            process.send_signal(number)
        while True:
            try:
                return process.wait(POLL_S), bool(received)
            except subprocess.TimeoutExpired:
                poll()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
