"""A job for a cluster: what runs where, as one record that every kind of launcher renders."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tvr.launchers.restart_policy import Policy

FOLDER = "launch"
RECORD = "job.json"
"""Of the job that was submitted last; what a job itself reads lies in RECORDS."""
RECORDS = "jobs"
# What a command has in the place of the number of an array's task.
TASK = "%a"

# Variables that change what ranks do, written into the job so that it can be given again from
# another shell; names that look like secrets are left to the batch system.
CAPTURED = re.compile(
    r"PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|CONDA_PREFIX|CC|CXX"
    r"|(CUDA|DS|FI|GLOO|HF|NCCL|OMP|PYTORCH|TORCH|TRITON|UCX)_\w+"
)
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|KEY")
DEVICES = "CUDA_VISIBLE_DEVICES"
NO_DEVICES = ("", "-1")

NAME = re.compile(r"[^\\\n]+")
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """The image in which ranks run; the batch script itself runs outside."""

    image: str
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: tuple[str, ...] = ()
    """SOURCE:TARGET, beside the run's folder and the directory, which keep their names inside."""
    python: str = "python3"
    """The interpreter inside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job. Paths are absolute, on a disk that all nodes share."""

    command: tuple[str, ...]
    """Of every rank: `tvr ...` or anything else. An array's task has its number at `%a`."""
    run_dir: str
    """Its folder `launch` holds its jobs' records and scripts, and all output."""
    directory: str
    """Where the command starts."""
    python: str
    """The interpreter on the nodes."""
    name: str
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_rank: int | None = None
    memory: str | None = None
    """Of a node, as `sbatch --mem` takes it."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_limit: str | None = None
    """As `sbatch --time` takes it; none: the partition's."""
    exclude: tuple[str, ...] = ()
    """Nodes not to use."""
    dependency: str | None = None
    array: str | None = None
    """Numbers of the tasks of a job array."""
    notice_s: int = 300
    """Seconds before the end of the time at which ranks are told to save and leave."""
    notice_given: bool = False
    """Whether that is the user's own word; else it follows from how long saves took."""
    interface: str | None = None
    """Network interface of NCCL and gloo; none: they choose."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables set on the nodes."""
    container: Container | None = None
    targets: str | None = None
    """Folder in which Prometheus looks for targets."""
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        for what in ("nodes", "ranks_per_node", "notice_s"):
            _check(getattr(self, what) >= 1, what, getattr(self, what), "at least 1")
        gpus, cpus = self.gpus_per_node, self.cpus_per_rank
        _check(gpus >= 0, "gpus_per_node", gpus, "0 or more")
        _check(cpus is None or cpus >= 1, "cpus_per_rank", cpus, "at least 1")
        _check(bool(self.command), "command", self.command, "one such as `tvr train ...`")
        # SLURM's options and patterns of file names take a backslash for themselves.
        for what in ("name", "run_dir", "directory"):
            value = getattr(self, what)
            _check(NAME.fullmatch(value) is not None, what, value, "without backslash and newline")
        if self.time_limit is not None:
            seconds(self.time_limit)
        if self.container is not None:
            # Either would end a mount: SOURCE:TARGET,SOURCE:TARGET.
            for what in ("run_dir", "directory"):
                value = getattr(self, what)
                fine = not set(value) & set(":,")
                _check(fine, what, value, "without colon and comma: a container has it as a mount")
        if self.array is not None and TASK in self.run_dir:
            raise ValueError(
                f"run_dir={self.run_dir!r}: {TASK} is each task's own, and the array's script and"
                " output need one folder; give the launch a --run-dir of its own, before `--`"
            )
        numbered = any(TASK in word for word in self.command)
        if self.array is not None and not numbered:
            raise ValueError(
                f"array={self.array!r}: every task would do the same; the command must hold {TASK},"
                f" the task's number, as in `tvr pack --task {TASK}/8`"
            )

    @property
    def folder(self) -> Path:
        """Of records, scripts and output."""
        return Path(self.run_dir, FOLDER)

    def record(self, name: str) -> Path:
        """Where a job reads how it was submitted, each at a name of its own: those that run already
        keep what they were."""
        return self.folder / RECORDS / f"{name}.json"

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def to_json(job: Job) -> str:
    return json.dumps(asdict(job), indent=1) + "\n"


def from_json(text: str) -> Job:
    """Raises KeyError or TypeError where it is the record of another version."""
    values: dict[str, Any] = json.loads(text)
    if container := values["container"]:
        values["container"] = Container(**{**container, "mounts": tuple(container["mounts"])})
    values["policy"] = Policy(**values["policy"])
    values |= {name: tuple(values[name]) for name in ("command", "exclude")}
    return Job(**values)


def read_job(run_dir: Path) -> Job:
    """The job of a run: of several the last one that was submitted.

    Raises:
        ValueError: it has none, or it is of another version of the program.
    """
    path = run_dir / FOLDER / RECORD
    try:
        return read_record(path)
    except FileNotFoundError:
        raise ValueError(f"{run_dir} was not launched on a cluster: there is no {path}") from None


def read_record(path: Path) -> Job:
    """One job's.

    Raises:
        ValueError: it is of another version of the program.
    """
    try:
        return from_json(path.read_text())
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is of another version of tvr: {error}") from None


def captured(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a job takes along."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if CAPTURED.fullmatch(name) and not SECRET.search(name)
    }


def without_devices(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables but for the GPUs of this machine, which a cluster's are not; that there are to
    be none goes along."""
    named = environment.get(DEVICES, "").strip() not in NO_DEVICES
    return {k: v for k, v in environment.items() if k != DEVICES or not named}


def environment_of(job: Job) -> dict[str, str]:
    """The variables of its ranks."""
    variables = dict(job.environment)
    if job.interface is not None:
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        variables |= dict.fromkeys(names, job.interface)
    if job.gpus_per_node:
        # A rank that sees fewer must not train on the CPU instead.
        variables["TVR_GPUS_PER_NODE"] = str(job.gpus_per_node)
    return variables


def run_dir_of(command: Sequence[str]) -> str | None:
    """What the command itself names as its run's folder."""
    for word, following in zip(command, [*command[1:], None], strict=True):
        if word == "--run-dir":
            return following
        if word.startswith("--run-dir="):
            return word.removeprefix("--run-dir=")
    return None


def seconds(time_limit: str) -> int:
    """Of a time in SLURM's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        ValueError: it is none.
    """
    match = TIME.fullmatch(time_limit)
    if match is None:
        raise ValueError(f"time {time_limit!r} must be minutes, H:M:S or D-H:M:S")
    numbers = [int(number) for number in match.groups()[1:] if number is not None]
    if match[1] is not None:
        hours, minutes, rest = (*numbers, 0, 0)[:3]
        return ((int(match[1]) * 24 + hours) * 60 + minutes) * 60 + rest
    if len(numbers) < 3:
        minutes, rest = (*numbers, 0)[:2]
        return 60 * minutes + rest
    hours, minutes, rest = numbers
    return (60 * hours + minutes) * 60 + rest


def _check(fine: bool, what: str, value: object, allowed: str) -> None:
    if not fine:
        raise ValueError(f"{what}={value!r} must be {allowed}")
