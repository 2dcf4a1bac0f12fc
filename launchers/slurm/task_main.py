"""Entry point of each rank under srun: sets torch's variables, then runs the job's command."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence

from tvr.launchers.exit_codes import EXIT_PREEMPTED
from tvr.launchers.host_limits import host_cpus
from tvr.launchers.job import EXIT_GRACE, default_exit_grace_s
from tvr.launchers.process import is_tvr_command, path_with_scripts
from tvr.launchers.rank_main import end_process, run_tvr


def torch_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Translates SLURM's variables of a task to the variables that torch.distributed reads."""
    ranks_here = str(ranks_on_this_node(environment))
    variables = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(number_of_ranks(environment)),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": ranks_here,
    }
    # The same share as in `tvr launch local`; torch's default would leave cores idle.
    cores = environment.get("SLURM_CPUS_PER_TASK")
    threads = int(cores) if cores else host_cpus().usable // int(ranks_here)
    variables["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", str(max(1, threads)))
    variables["PATH"] = path_with_scripts(environment.get("PATH", ""))
    return variables


def number_of_ranks(environment: Mapping[str, str]) -> int:
    """Ranks of the job. Versions of SLURM differ in the variables that they set."""
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_NPROCS"):
        if environment.get(name):
            return int(environment[name])
    raise ValueError("SLURM_NTASKS is missing: srun must start the ranks")


def ranks_on_this_node(environment: Mapping[str, str]) -> int:
    """Ranks on this node: from the number for all nodes, or else from the list `2(x3),1`."""
    if environment.get("SLURM_NTASKS_PER_NODE"):
        return int(environment["SLURM_NTASKS_PER_NODE"])
    listed = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment["SLURM_TASKS_PER_NODE"]
    counts: list[int] = []
    for item in listed.split(","):
        count, _, times = item.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[int(environment.get("SLURM_NODEID", 0))]


def exit_grace_s(environment: Mapping[str, str]) -> float:
    """Seconds for which a preempted rank waits before it exits.

    srun kills the other ranks as soon as one exits with a code other than 0. The delay lets all
    preempted ranks finish first.
    """
    given = environment.get(EXIT_GRACE)
    return float(given) if given else default_exit_grace_s(number_of_ranks(environment))


def run_task(command: Sequence[str]) -> int:
    """Runs `tvr ...` in this process, or replaces the process with any other command."""
    os.environ.update(torch_environment(os.environ))
    if not is_tvr_command(command):
        os.execvp(command[0], list(command))
    code = run_tvr(command[1:])
    if code == EXIT_PREEMPTED:
        time.sleep(exit_grace_s(os.environ))
    return code


if __name__ == "__main__":
    end_process(run_task(sys.argv[1:]))
