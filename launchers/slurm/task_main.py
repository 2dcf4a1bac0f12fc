"""What srun starts as each rank: the job's command, told who it is among the ranks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence

from tvr.launchers.exit_codes import EXIT_PREEMPTED
from tvr.launchers.rank_main import end_process, run_tvr
from tvr.launchers.torchrun.launch import is_tvr, path_with_scripts

# The first rank to end otherwise than well makes srun kill the others; those that were told to
# leave all end by themselves within this time.
TAKE_LEAVE_S = 2.0


def place(environment: Mapping[str, str]) -> dict[str, str]:
    """The names that torch gives to what SLURM tells a task."""
    ranks_here = environment["SLURM_NTASKS_PER_NODE"]
    ours = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": ranks_here,
    }
    # As `tvr launch local` shares them out; with fewer threads cores stay idle.
    cores = environment.get("SLURM_CPUS_PER_TASK")
    threads = int(cores) if cores else len(os.sched_getaffinity(0)) // int(ranks_here)
    ours["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", str(max(1, threads)))
    ours["PATH"] = path_with_scripts(environment.get("PATH", ""))
    return ours


def run_task(command: Sequence[str]) -> int:
    """Runs `tvr ...` in this process, or becomes any other command."""
    os.environ.update(place(os.environ))
    if not is_tvr(command):
        os.execvp(command[0], list(command))
    code = run_tvr(command[1:])
    if code == EXIT_PREEMPTED:
        time.sleep(TAKE_LEAVE_S)
    return code


if __name__ == "__main__":
    end_process(run_task(sys.argv[1:]))
