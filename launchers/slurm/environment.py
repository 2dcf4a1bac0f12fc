"""Environment variables by which a shell changes what SLURM's commands do.

sbatch reads SBATCH_* variables, which override the lines of a script. A job inherits the variables
of the shell that submits it, and srun reads SLURM_* and SRUN_* variables there. Inside another job,
that job's own variables do both. So a submission drops all of them, except those without which the
commands would not find the cluster.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tvr.launchers.job import SECRET, without_gpu_selection
from tvr.launchers.sbatch_options import instead_of

# Where the cluster is, how to authenticate, and the variables that sites set for wrappers.
NEEDED = re.compile(
    r"SLURM_(?:CONF|CONF_SERVER|JWT|SACK_\w+|CLUSTERS|DEBUG_FLAGS|ROOT|HOME|PREFIX|BIN|BINDIR|VERSION)"
    r"|SBATCH_CLUSTERS"
)
CLUSTERS = ("SLURM_CLUSTERS", "SBATCH_CLUSTERS")
OF_SLURM = re.compile(r"(?:SLURM|SLURMD|SLURMSTEPD|SBATCH|SRUN|SALLOC)_\w+")
OF_A_STEP = re.compile(r"PMI2?_\w+|PMIX_\w+")
# Filters and formats of the other commands.
OF_COMMANDS = re.compile(r"(?:SACCT|SCANCEL|SCONTROL|SINFO|SQUEUE)_\w+")
# A user's or a site's defaults for the place of a job, which become options of the job.
ADOPTED = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_WCKEY": "wckey",
}
# Names that differ from those of the options.
OPTION_NAMES = {
    "ARRAY_INX": "array",
    "DEBUG": "verbose",
    "MEM_PER_NODE": "mem",
    "REQ_SWITCH": "switches",
    "TIMELIMIT": "time",
    "WAIT4SWITCH": "switches",
}
# What would change where, how long or with what ranks run, or where their output goes. SLURM sets
# none of these in a batch shell, and srun's command line gives the others. Bindings such as
# SLURM_CPU_BIND are left to the site.
OF_SRUN = re.compile(
    r"SRUN_\w+|SLURM_(?:ACCOUNT|BCAST\w*|CONSTRAINT|DEPENDENCY|DISABLE_STATUS|EPILOG|EXACT|EXCLUSIVE"
    r"|EXIT_ERROR|EXIT_IMMEDIATE|GRES|IMMEDIATE|LABELIO|NO_KILL|OVERLAP|PARTITION|PROLOG|QOS"
    r"|REMOTE_CWD|RESERVATION|SIGNAL|STDERRMODE|STDINMODE|STEP_GRES|TEST_EXEC|TIMELIMIT"
    r"|UNBUFFEREDIO|WORKING_DIR)"
)


def submission_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for sbatch, which the job inherits: without those that change the job."""
    within = is_within_a_job(environment)
    kept = {
        name: value
        for name, value in environment.items()
        if not (OF_SLURM.fullmatch(name) or (within and OF_A_STEP.fullmatch(name)))
        or NEEDED.fullmatch(name)
    }
    return without_gpu_selection(kept)


def command_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for SLURM's other commands: without filters and formats of the user.

    Within a job, the commands ask the job's own cluster.
    """
    within = is_within_a_job(environment)
    return {
        name: value
        for name, value in environment.items()
        if not (OF_COMMANDS.fullmatch(name) or (within and name in CLUSTERS))
    }


def step_environment(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Variables for srun without those that override what the job asked for, and these names."""
    dropped = sorted(filter(OF_SRUN.fullmatch, environment))
    return {name: value for name, value in environment.items() if name not in dropped}, dropped


def adopted_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Values of sbatch options that the shell's variables give, by option."""
    return {option: environment[name] for name, option in ADOPTED.items() if environment.get(name)}


def unused_variables(environment: Mapping[str, str], adopted: Mapping[str, str]) -> list[str]:
    """One line for each variable that a submission drops, with the setting to use instead.

    Args:
        environment: The shell's variables.
        adopted: Options that the job has taken from variables.
    """
    lines: list[str] = []
    within = is_within_a_job(environment)
    for name, value in sorted(environment.items()):
        if not OF_SLURM.fullmatch(name) or NEEDED.fullmatch(name):
            continue
        if not name.startswith("SBATCH_"):
            if not within:
                lines.append(f"{name}={_shown(name, value)} is not passed on to the ranks")
            continue
        option = ADOPTED.get(name)
        if option is not None and adopted.get(option) == value:
            lines.append(f"{name}={value} is used: --{option}={value}")
            continue
        option = name.removeprefix("SBATCH_")
        option = OPTION_NAMES.get(option, option.lower().replace("_", "-"))
        shown = _shown(name, value)
        lines.append(f"{name}={shown} is not passed on; {instead_of(option, shown)}")
    if within:
        job_id = environment.get("SLURM_JOB_ID") or environment.get("SLURM_JOBID")
        lines.append(f"the variables of job {job_id}, in which this runs, are not passed on")
    return lines


def is_within_a_job(environment: Mapping[str, str]) -> bool:
    """True inside a job or an allocation."""
    return "SLURM_JOB_ID" in environment or "SLURM_JOBID" in environment


def _shown(name: str, value: str) -> str:
    # A value may list further variables, as SBATCH_EXPORT does.
    is_secret = SECRET.search(name) or ("=" in value and SECRET.search(value.upper()))
    return "..." if is_secret else value
