"""Starts the ranks of a job on this machine through torchrun, and learns how they ended."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# Linux: a signal for the process once its parent is gone, so that a killed launcher leaves no rank.
PR_SET_PDEATHSIG = 1


def run_local(command: Sequence[str], *, ranks: int) -> int:
    """Runs `command` on `ranks` ranks and returns the job's exit code (see `job_exit_code`).

    SIGINT and SIGTERM reach every rank, and the ranks' answer is waited for (30 s, or what
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT says; then torchrun kills them). Of a command other than
    `tvr ...` only success (0) and failure (3) can be told.
    """
    with tempfile.TemporaryDirectory(prefix="tvr-launch-") as folder:
        codes = Path(folder, "exit-codes")
        line = torchrun_command(command, ranks=ranks, python=sys.executable, codes=codes)
        environment = rank_environment(os.environ, ranks=ranks, cores=len(os.sched_getaffinity(0)))
        torchrun_code = _run_passing_signals(line, environment)
        if not _is_tvr(command):
            return 0 if torchrun_code == 0 else 3
        return job_exit_code(read_codes(codes), torchrun_code=torchrun_code)


def torchrun_command(command: Sequence[str], *, ranks: int, python: str, codes: Path) -> list[str]:
    """The line that starts the ranks: `tvr ...` by this interpreter, anything else as given."""
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1")
    if not command:
        raise ValueError("the command of the ranks is empty; give one such as `tvr train ...`")
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    if _is_tvr(command):
        return [*torchrun, "-m", "tvr.launchers.rank", str(codes), *command[1:]]
    return [*torchrun, "--no-python", *command]


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


def read_codes(codes: Path) -> list[int]:
    """The exit codes of the ranks that came to their end, in the order in which they ended."""
    return [int(line) for line in codes.read_text().split()] if codes.exists() else []


def job_exit_code(codes: Sequence[int], *, torchrun_code: int) -> int:
    """One code for all ranks: 0 if all ended well; that of the first to fail if it is one that
    tells what to do (2: correct the line, 75: start again, from a checkpoint); else 3."""
    failures = [code for code in codes if code != 0]
    if not failures:
        return 0 if torchrun_code == 0 else 3
    return failures[0] if failures[0] in (2, 75) else 3


def die_with_parent(signal_number: int) -> None:
    """Asks the kernel to send this process a signal once its parent is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number)


def _is_tvr(command: Sequence[str]) -> bool:
    return command[0] == "tvr"


def _run_passing_signals(line: Sequence[str], environment: Mapping[str, str]) -> int:
    pending: list[int] = []
    passed_on = (signal.SIGINT, signal.SIGTERM)
    # A signal between here and the start of torchrun is kept and passed on then.
    before = {
        number: signal.signal(number, lambda got, _: pending.append(got)) for number in passed_on
    }
    try:
        # Its own session: a terminal's Ctrl-C then comes once, from us, and not twice.
        process = subprocess.Popen(
            line,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
        )
        for number in passed_on:
            signal.signal(number, lambda got, _: process.send_signal(got))
        for number in pending:
            process.send_signal(number)
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
