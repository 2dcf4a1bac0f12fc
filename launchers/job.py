"""Record of a cluster job, from which every launcher renders its own form."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tvr.launchers.job_values import check_job_values
from tvr.launchers.restart_policy import RestartPolicy
from tvr.launchers.sbatch_options import check_sbatch_options, option_value

LAUNCH_DIR = "launch"
JOB_FILE = "job.json"
"""Record of the newest submitted job. A running job reads its own record in `RECORDS_DIR`."""
RECORDS_DIR = "jobs"
TASK_ID = "%a"
"""Placeholder in the command of an array for the task's number."""

# Environment variables that affect ranks. They are stored in the job, so that it can be submitted
# again from another shell. Names that look like secrets are never stored.
CAPTURED = re.compile(
    r"PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|CONDA_PREFIX|CC|CXX"
    r"|(CUDA|DS|FI|GLOO|HF|NCCL|OMP|PYTORCH|TORCH|TRITON|UCX)_\w+",
    re.ASCII,
)
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|KEY")
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
NO_DEVICES = ("", "-1")

EXIT_GRACE = "TVR_EXIT_GRACE_S"
"""Environment variable that carries `Job.exit_grace_s` to the ranks."""
METRICS_ADDRESS = "TVR_METRICS_ADDRESS"
"""Environment variable that says where ranks serve metrics, unless `metrics.address` does."""
# Ranks finish a save within a spread that grows with their number.
MIN_EXIT_GRACE_S, MAX_EXIT_GRACE_S, EXIT_GRACE_PER_RANK_S = 2.0, 30.0, 0.05

NAME = re.compile(r"[^\\]+")
NO_LIMIT = ("UNLIMITED", "INFINITE")
TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """Image in which the ranks run. The batch script runs outside of it."""

    image: str
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: tuple[str, ...] = ()
    """SOURCE:TARGET. The run folder and the working directory are mounted in addition, at their
    own paths."""
    python: str = "python3"
    """Interpreter in the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One cluster job. Paths are absolute, on a file system that all nodes share."""

    command: tuple[str, ...]
    """Command of every rank, `tvr ...` or any other. `%a` is replaced by an array task's number."""
    run_dir: str
    """Run folder. Its sub-folder `launch` holds job records, scripts and all output."""
    directory: str
    """Working directory of the command."""
    python: str
    """Interpreter on the nodes."""
    name: str
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_rank: int | None = None
    memory: str | None = None
    """Memory per node, in the form of `sbatch --mem`."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_limit: str | None = None
    """In the form of `sbatch --time`; None uses the partition's limit."""
    exclude: tuple[str, ...] = ()
    """Nodes that the job must not use."""
    dependency: str | None = None
    array: str | None = None
    """Task numbers of a job array."""
    notice_s: int = 300
    """Seconds before the time limit at which ranks are asked to save and exit."""
    notice_given: bool = False
    """True if the user set `notice_s`; otherwise it is derived from measured times."""
    interface: str | None = None
    """Network interface of NCCL and gloo; None lets them choose."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the ranks."""
    container: Container | None = None
    exit_grace_s: float | None = None
    """Seconds for which a preempted rank waits before it exits, because srun kills the others then.
    None derives it from the number of ranks."""
    targets: str | None = None
    """Folder of Prometheus's file_sd target files."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, each `NAME` or `NAME=VALUE`."""
    continues: tuple[str, ...] = ()
    """IDs of the jobs whose work this one continues, oldest first: it shares their restart budget.
    A job that SLURM does not requeue submits one that continues it."""
    failed_nodes: tuple[str, ...] = ()
    """Nodes to exclude because those jobs failed there."""
    policy: RestartPolicy = field(default_factory=RestartPolicy)

    def __post_init__(self) -> None:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        check_job_values(values)
        check_sbatch_options(self.sbatch, values)
        for variable in (option_value(self.sbatch, "export") or "").split(","):
            name, has_value, _ = variable.partition("=")
            if has_value and SECRET.search(name):
                raise ValueError(
                    f"sbatch: --export gives {name} a value, which would be stored in the run's"
                    f" folder; export it in the shell, and pass on its name alone"
                )
        for name in ("nodes", "ranks_per_node", "notice_s"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        gpus, cpus = self.gpus_per_node, self.cpus_per_rank
        _check(gpus >= 0, "gpus_per_node", gpus, "0 or more")
        _check(cpus is None or cpus >= 1, "cpus_per_rank", cpus, "at least 1")
        grace = self.exit_grace_s
        _check(grace is None or grace >= 0, "exit_grace_s", grace, "0 or more")
        _check(bool(self.command), "command", self.command, "a command such as `tvr train ...`")
        # SLURM interprets backslashes in options and in file name patterns.
        for name in ("name", "run_dir", "directory"):
            value = getattr(self, name)
            _check(NAME.fullmatch(value) is not None, name, value, "without backslash")
        if self.time_limit is not None:
            parse_time_limit(self.time_limit)
        if self.container is not None:
            # `apptainer exec` would take them for options.
            for name in ("image", "python"):
                value = getattr(self.container, name)
                valid = bool(value) and not value.startswith("-")
                _check(valid, f"container.{name}", value, "a text that does not begin with a dash")
            # Mounts are written as SOURCE:TARGET,SOURCE:TARGET.
            for name in ("run_dir", "directory"):
                value = getattr(self, name)
                valid = not set(value) & set(":,")
                _check(valid, name, value, "without colon and comma to be mounted in a container")
        if self.array is not None and TASK_ID in self.run_dir:
            raise ValueError(
                f"run_dir={self.run_dir!r} contains {TASK_ID}, but an array needs one folder for"
                " its script and output; give a --run-dir before `--`"
            )
        numbered = any(TASK_ID in word for word in self.command)
        if self.array is not None and not numbered:
            raise ValueError(
                f"array={self.array!r}: every task would do the same; the command must contain"
                f" {TASK_ID}, the task's number, as in `tvr pack --task {TASK_ID}/8`"
            )

    @property
    def launch_dir(self) -> Path:
        """Folder of job records, scripts and output."""
        return Path(self.run_dir, LAUNCH_DIR)

    def record_path(self, name: str) -> Path:
        """Path of one submission's record, so that a later submission cannot change it."""
        return self.launch_dir / RECORDS_DIR / f"{name}.json"


def to_json(job: Job) -> str:
    return json.dumps(asdict(job), indent=1) + "\n"


def from_json(text: str) -> Job:
    """Reads a record written by `to_json`.

    Raises:
        KeyError, TypeError: another version of the program wrote the record.
    """
    values: dict[str, Any] = json.loads(text)
    if container := values["container"]:
        values["container"] = Container(**{**container, "mounts": tuple(container["mounts"])})
    values["policy"] = RestartPolicy(**values["policy"])
    values |= {name: tuple(values[name]) for name in ("command", "exclude")}
    # Absent in the records of earlier versions, whose jobs may still run.
    values |= {
        name: tuple(values.get(name, ())) for name in ("sbatch", "continues", "failed_nodes")
    }
    return Job(**values)


def read_job(run_dir: Path) -> Job:
    """Reads the newest submitted job of a run.

    Raises:
        ValueError: the run has no job, or another version of the program wrote its record.
    """
    path = run_dir / LAUNCH_DIR / JOB_FILE
    try:
        return read_job_record(path)
    except FileNotFoundError:
        raise ValueError(f"{run_dir} was not launched on a cluster: {path} is missing") from None


def read_job_record(path: Path) -> Job:
    """Reads the record of one job.

    Raises:
        ValueError: another version of the program wrote the record.
    """
    try:
        return from_json(path.read_text())
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} was written by another version of tvr: {error}") from None


def captured_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Selects the environment variables that affect ranks and are no secrets."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if CAPTURED.fullmatch(name) and not SECRET.search(name)
    }


def without_gpu_selection(environment: Mapping[str, str]) -> dict[str, str]:
    """Drops `CUDA_VISIBLE_DEVICES` if it names GPUs of this machine.

    The nodes have other GPUs. A value that hides all GPUs is kept.
    """
    selects = environment.get(VISIBLE_DEVICES, "").strip() not in NO_DEVICES
    return {k: v for k, v in environment.items() if k != VISIBLE_DEVICES or not selects}


def job_environment(job: Job) -> dict[str, str]:
    """Environment variables that a job sets for its ranks."""
    variables = dict(job.environment)
    if job.interface is not None:
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        variables |= dict.fromkeys(names, job.interface)
    if job.gpus_per_node:
        # A rank that sees fewer GPUs must fail instead of training on the CPU.
        variables["TVR_GPUS_PER_NODE"] = str(job.gpus_per_node)
    if job.targets is not None:
        # Another machine scrapes the metrics, so loopback would not do.
        variables[METRICS_ADDRESS] = "0.0.0.0"
    if job.exit_grace_s is not None:
        variables[EXIT_GRACE] = f"{job.exit_grace_s:g}"
    return variables


def command_run_dir(command: Sequence[str]) -> str | None:
    """Returns the value of `--run-dir` in a command, or None."""
    for word, following in zip(command, [*command[1:], None], strict=True):
        if word == "--run-dir":
            return following
        if word.startswith("--run-dir="):
            return word.removeprefix("--run-dir=")
    return None


def task_run_dir(job: Job, task: str | None) -> Path:
    """Folder to which the ranks of a job, or of one array task, write.

    Args:
        job: The job.
        task: Number of the array task; None without an array.
    """
    # It may differ from `job.run_dir`, which holds the script and all output.
    own = command_run_dir(job.command) or job.run_dir
    return Path(job.directory, own if task is None else own.replace(TASK_ID, task))


def all_run_dirs(job: Job) -> list[Path]:
    """Folders of a job's tasks that exist; without an array, the job's own folder."""
    folder = task_run_dir(job, None)
    if job.array is None or TASK_ID not in str(folder):
        return [folder]
    pattern = glob.escape(str(folder)).replace(TASK_ID, "*")
    return [Path(path) for path in sorted(glob.glob(pattern))]


def default_exit_grace_s(ranks: int) -> float:
    """Seconds between the first and the last exit of preempted ranks, with a margin."""
    return min(MAX_EXIT_GRACE_S, max(MIN_EXIT_GRACE_S, EXIT_GRACE_PER_RANK_S * ranks))


def parse_time_limit(time_limit: str) -> int:
    """Converts a SLURM time to seconds: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    0, UNLIMITED and INFINITE are 0: without a limit.

    Raises:
        ValueError: the text has none of these forms.
    """
    if time_limit.upper() in NO_LIMIT:
        return 0
    match = TIME_LIMIT.fullmatch(time_limit)
    if match is None:
        raise ValueError(f"time {time_limit!r} must be minutes, H:M:S or D-H:M:S")
    numbers = [int(number) for number in match.groups()[1:] if number is not None]
    if match[1] is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return ((int(match[1]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) < 3:
        minutes, seconds = (*numbers, 0)[:2]
        return 60 * minutes + seconds
    hours, minutes, seconds = numbers
    return (60 * hours + minutes) * 60 + seconds


def _check(valid: bool, name: str, value: object, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{name}={value!r} must be {allowed}")
