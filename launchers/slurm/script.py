"""The batch script of a job, as text."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from tvr.launchers.job import TASK, Container, Job, environment_of, seconds


def sbatch_script(job: Job, record: Path) -> str:
    """For `sbatch`: its options, the environment, and the line that starts the ranks.

    `record` is where the job will read how it was submitted.
    srun starts every rank itself; `launchers.batch` stays beside it in the batch shell.
    """
    started = [
        shlex.join([job.python, "-m", "tvr.launchers.slurm.batch_main", str(record)]),
        shlex.join(_srun(job)),
        *([shlex.join(_into(job.container, job))] if job.container else []),
        shlex.join([_python(job), "-m", "tvr.launchers.slurm.task_main"]),
        _command(job),
    ]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment_of(job).items()]
    parts = [
        [
            "#!/bin/bash",
            f"# Nodes: {job.nodes}, ranks on each: {job.ranks_per_node}. By `tvr launch slurm`.",
            *(f"#SBATCH --{option}" for option in _options(job)),
            "set -euo pipefail",
        ],
        exports,
        [
            "# Finds where ranks meet, passes the notice on, decides whether the job comes again.",
            "exec " + " \\\n    ".join(started),
        ],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def notice_s(job: Job) -> int:
    """Seconds before the end of its time at which the job is told; half of a short time at most."""
    limit = seconds(job.time_limit) if job.time_limit else 0
    return min(job.notice_s, limit // 2) if limit else job.notice_s


def _options(job: Job) -> Iterator[str]:
    yield f"job-name={_quoted(job.name)}"
    yield f"nodes={job.nodes}"
    yield f"ntasks-per-node={job.ranks_per_node}"
    if job.gpus_per_node:
        yield f"gpus-per-node={job.gpus_per_node}"
    given = {
        "cpus-per-task": job.cpus_per_rank,
        "mem": job.memory,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "time": job.time_limit,
        "exclude": ",".join(job.exclude) or None,
        "dependency": job.dependency,
        "array": job.array,
    }
    yield from (f"{name}={value}" for name, value in given.items() if value is not None)
    yield f"chdir={_quoted(job.directory)}"
    yield f"output={_quoted(_pattern(job, '%j.out'))}"
    yield "open-mode=append"
    yield "requeue"
    # To the batch shell alone: it passes it to the ranks, and not to their helpers.
    yield f"signal=B:USR1@{notice_s(job)}"


def _srun(job: Job) -> list[str]:
    # A site's SBATCH_EXPORT=NONE would keep the meeting place from ranks, its WaitTime end them.
    line = ["srun", "--export=ALL", "--wait=0", "--kill-on-bad-exit=1", "--open-mode=append"]
    line.append(f"--output={_pattern(job, '%j.rank-%5t.log')}")
    if job.cpus_per_rank is not None:
        # srun takes over everything from sbatch but this.
        line.append(f"--cpus-per-task={job.cpus_per_rank}")
    return line


def _into(container: Container, job: Job) -> list[str]:
    """Into the image, with the job's folders at their own names."""
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


def _command(job: Job) -> str:
    if job.array is None:
        return shlex.join(job.command)
    number = '"${SLURM_ARRAY_TASK_ID:?}"'
    return " ".join(_with(word.split(TASK), number) for word in job.command)


def _with(pieces: Sequence[str], between: str) -> str:
    if len(pieces) == 1:
        return shlex.quote(pieces[0])
    return between.join(shlex.quote(piece) if piece else "" for piece in pieces)


def _pattern(job: Job, name: str) -> str:
    """SLURM's pattern of a file name: per cents of the folder are its own."""
    return f"{job.folder}/".replace("%", "%%") + name


def _quoted(text: str) -> str:
    """As sbatch reads a directive."""
    return '"' + text.replace('"', '\\"') + '"'
