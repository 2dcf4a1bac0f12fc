"""Renders the batch script of a job as text."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from tvr.launchers.job import TASK_ID, Container, Job, job_environment, parse_time_limit
from tvr.launchers.job_values import PLAIN_VALUE
from tvr.launchers.sbatch_options import gpus_per_node, option_value


def sbatch_script(job: Job, record: Path) -> str:
    """Renders the script for `sbatch`: options, environment, and the command of the ranks.

    srun starts every rank; `batch_main` stays beside it in the batch shell.

    Args:
        job: The job to run.
        record: Path at which the running job finds its own record.
    """
    command = [
        shlex.join([job.python, "-m", "tvr.launchers.slurm.batch_main", str(record)]),
        shlex.join(_srun(job)),
        *([shlex.join(_in_container(job.container, job))] if job.container else []),
        shlex.join([_python(job), "-m", "tvr.launchers.slurm.task_main"]),
        _rank_command(job),
    ]
    variables = job_environment(job).items()
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables]
    parts = [
        [
            "#!/bin/bash",
            f"# Nodes: {job.nodes}, ranks per node: {job.ranks_per_node}."
            " Written by `tvr launch slurm`.",
            *(f"#SBATCH --{option}" for option in _options(job)),
            "set -euo pipefail",
        ],
        exports,
        [
            "# batch_main sets the rendezvous address, forwards the preemption notice to the",
            "# ranks, and decides whether the job restarts.",
            "exec " + " \\\n    ".join(command),
        ],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def effective_notice_s(job: Job) -> int:
    """Seconds before the time limit at which SLURM sends the notice: at most half of the limit."""
    # SLURM may shorten the limit down to --time-min to start the job earlier.
    texts = (job.time_limit, option_value(job.sbatch, "time-min"))
    limits = [limit for text in texts if text and (limit := parse_time_limit(text))]
    return min(job.notice_s, min(limits) // 2) if limits else job.notice_s


def _options(job: Job) -> Iterator[str]:
    yield f"job-name={_directive_quoted(job.name)}"
    yield f"nodes={job.nodes}"
    yield f"ntasks-per-node={job.ranks_per_node}"
    if job.gpus_per_node and gpus_per_node(job.sbatch) is None:
        yield f"gpus-per-node={job.gpus_per_node}"
    optional = {
        "cpus-per-task": job.cpus_per_rank,
        "mem": job.memory,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "time": job.time_limit,
        "exclude": ",".join(dict.fromkeys((*job.exclude, *job.failed_nodes))) or None,
        "dependency": job.dependency,
        "array": job.array,
    }
    yield from (f"{name}={value}" for name, value in optional.items() if value is not None)
    yield from map(_quoted_option, job.sbatch)
    yield f"chdir={_directive_quoted(job.directory)}"
    yield f"output={_directive_quoted(_output_pattern(job, '%j.out'))}"
    yield "open-mode=append"
    yield "requeue"
    # B: to the batch shell only, which forwards it to the ranks but not to their worker processes.
    yield f"signal=B:USR1@{effective_notice_s(job)}"


def _srun(job: Job) -> list[str]:
    # A job may have --export=NONE, which would hide the rendezvous address from the ranks. A site
    # may set WaitTime, which would end ranks that still save.
    line = ["srun", "--export=ALL", "--wait=0", "--kill-on-bad-exit=1", "--open-mode=append"]
    line.append(f"--output={_output_pattern(job, '%j.rank-%5t.log')}")
    if job.cpus_per_rank is not None:
        # The only option that srun does not inherit from sbatch.
        line.append(f"--cpus-per-task={job.cpus_per_rank}")
    return line


def _in_container(container: Container, job: Job) -> list[str]:
    """Options or command that run the ranks in the image."""
    mounts = dict.fromkeys(f"{folder}:{folder}" for folder in (job.run_dir, job.directory))
    mounts |= dict.fromkeys(container.mounts)
    if container.runtime == "apptainer":
        gpus = ["--nv"] if job.gpus_per_node else []
        binds = [f"--bind={mount}" for mount in mounts]
        return ["apptainer", "exec", *gpus, *binds, f"--pwd={job.directory}", container.image]
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={job.directory}",
    ]


def _python(job: Job) -> str:
    return job.container.python if job.container else job.python


def _rank_command(job: Job) -> str:
    if job.array is None:
        return shlex.join(job.command)
    number = '"${SLURM_ARRAY_TASK_ID:?}"'
    return " ".join(_quoted_join(word.split(TASK_ID), number) for word in job.command)


def _quoted_join(parts: Sequence[str], separator: str) -> str:
    if len(parts) == 1:
        return shlex.quote(parts[0])
    return separator.join(shlex.quote(part) if part else "" for part in parts)


def _output_pattern(job: Job, name: str) -> str:
    """File name pattern for SLURM, with the folder's own per cent signs escaped."""
    return f"{job.launch_dir}/".replace("%", "%%") + name


def _quoted_option(option: str) -> str:
    name, sign, value = option.partition("=")
    is_plain = PLAIN_VALUE.fullmatch(value) is not None
    return f"{name}{sign}{value}" if is_plain or not sign else f"{name}={_directive_quoted(value)}"


def _directive_quoted(text: str) -> str:
    """Quotes a value for an #SBATCH line."""
    return '"' + text.replace('"', '\\"') + '"'
