"""SLURM's commands, with retries, and parsers of their output."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FINAL_STATES = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
GONE = "GONE"
"""State of a job that SLURM no longer lists. It drops finished jobs after some minutes."""
UNREACHABLE = re.compile(
    r"Unable to contact slurm controller|Socket timed out on send/recv|Zero Bytes were transmitted"
)
# Without a connection, the command had no effect. In other cases the reply may have been lost.
NOT_CONNECTED = re.compile(r"Unable to contact slurm controller \(connect failure\)")
ALREADY_QUEUED = "Job is pending execution"
DOWN = re.compile(r"DOWN|FAIL|\*")
# In any other state, a node accepts no new jobs.
USABLE = re.compile(r"(idle|mixed|allocated|completing|reserved|planned)[~#@%^$!+-]?")
# Long enough for a restart of the controller, which must not decide how a job ends.
RETRY_WAITS_S = (5, 10, 20, 40, 80, 160)
TASK_FAILED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)")
NODE_FAILED = re.compile(r"srun: error: Node failure on (\S+)")
EXITED = re.compile(r"Exited with exit code (\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """State of one job, or of one task of an array."""

    job_id: str
    state: str
    """SLURM's state, such as RUNNING."""
    restarts: int
    reason: str
    """Why the job is pending; SLURM's `None` if it is not."""
    nodes: str
    """Node list; empty before the job runs."""

    @property
    def is_finished(self) -> bool:
        return self.state in FINAL_STATES or self.state == GONE


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailure:
    """First failed rank or node that srun reports."""

    node: str
    rank: int | None
    """None if the node itself failed."""
    description: str
    """srun's description, such as `Killed`."""

    @property
    def exit_code(self) -> int | None:
        """Exit code of the rank; None if a signal ended it."""
        match = EXITED.fullmatch(self.description)
        return int(match[1]) if match else None


def submit_script(script: Path) -> str:
    """Submits a batch script and returns the job ID.

    Raises:
        ValueError: SLURM rejects the script, is unreachable, or is not installed.
    """
    # Inside another job, that job's variables would override the script's options.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }
    # A retry after a lost reply would submit a second job.
    output = _run(["sbatch", "--parsable", str(script)], environment, retry_on=NOT_CONNECTED)
    return output.strip().split(";")[0]


def job_states(job_id: str) -> list[JobState]:
    """Returns the state of a job, or of every task of an array; `GONE` if SLURM lists neither."""
    try:
        text = _run(["scontrol", "--oneliner", "show", "job", job_id])
    except ValueError as error:
        if "Invalid job id" in str(error):
            return [JobState(job_id=job_id, state=GONE, restarts=0, reason="", nodes="")]
        raise
    return [_job_state(line) for line in text.splitlines() if line.strip()]


def node_field(node: str, field: str) -> str:
    """Returns a field of `scontrol show node`, such as NodeAddr or State; times are Unix times."""
    text = _show_nodes([node])
    value = _field(text, field)
    if value is None:
        raise ValueError(f"scontrol shows no {field} of node {node}: {text.strip()}")
    return value


def failed_node_since(nodes: Sequence[str], since_s: float) -> str | None:
    """Returns the first node that is down, or that restarted since a Unix time, or None.

    A node's daemon may have restarted alone. One command asks for all nodes: hundreds of commands,
    each of which may wait for a controller that restarts, would take longer than the job may.
    """
    lines = {_field(line, "NodeName"): line for line in _show_nodes(nodes).splitlines()}
    for node in nodes:
        line = lines.get(node)
        state = None if line is None else _field(line, "State")
        if line is None or state is None:
            raise ValueError(f"scontrol shows no State of node {node}")
        started = [_field(line, field) for field in ("BootTime", "SlurmdStartTime")]
        if DOWN.search(state) or any(t and t.isdecimal() and int(t) > since_s for t in started):
            return node
    return None


def _show_nodes(nodes: Sequence[str]) -> str:
    environment = os.environ | {"SLURM_TIME_FORMAT": "%s"}
    return _run(["scontrol", "--oneliner", "show", "node", ",".join(nodes)], environment)


def _field(text: str, field: str) -> str | None:
    match = re.search(rf"\b{field}=(\S+)", text)
    return match[1] if match else None


def usable_nodes(partition: str) -> set[str]:
    """Returns the nodes of a partition that a job may get now or later."""
    lines = _run(["sinfo", "-h", "-N", "-p", partition, "-o", "%N %T"]).splitlines()
    nodes = [line.split() for line in lines if line.strip()]
    return {node for node, state in nodes if USABLE.fullmatch(state)}


def requeue_job(job_id: str) -> None:
    """Ends a running job, the caller's own, and queues it again."""
    try:
        _run(["scontrol", "requeue", job_id])
    except ValueError as error:
        # A retry after a lost reply.
        if ALREADY_QUEUED not in str(error):
            raise


def update_queued_job(job_id: str, wait_s: float, exclude: Iterable[str] | None) -> None:
    """Sets the earliest start and the excluded nodes of a queued job.

    Args:
        job_id: A job that has just been requeued. SLURM refuses these changes for a running job,
            but accepts them while a requeued job still ends.
        wait_s: Seconds until the earliest start; 0 leaves it unchanged.
        exclude: Excluded nodes; None leaves them unchanged.
    """
    changes = [f"StartTime=now+{wait_s:.0f}"] if wait_s else []
    changes += [] if exclude is None else [f"ExcNodeList={','.join(exclude)}"]
    if changes:
        _run(["scontrol", "update", f"JobId={job_id}", *changes])


def cancel_job(job_id: str) -> None:
    """Ends a pending or running job."""
    _run(["scancel", job_id])


def first_step_failure(srun_errors: str) -> StepFailure | None:
    """Parses the first failed rank or node from srun's stderr; None if it reports none."""
    for line in srun_errors.splitlines():
        if match := TASK_FAILED.search(line):
            rank = int(re.split(r"[,-]", match[2])[0])
            return StepFailure(node=match[1], rank=rank, description=match[3].strip())
        if match := NODE_FAILED.search(line):
            return StepFailure(node=match[1].rstrip(","), rank=None, description="the node failed")
    return None


def _job_state(line: str) -> JobState:
    def field(name: str) -> str:
        match = re.search(rf"\b{name}=(\S*)", line)
        return match[1] if match else ""

    nodes = field("NodeList")
    return JobState(
        job_id=field("JobId"),
        state=field("JobState"),
        restarts=int(field("Restarts") or 0),
        reason=field("Reason"),
        nodes="" if nodes == "(null)" else nodes,
    )


def _run(
    line: list[str],
    environment: Mapping[str, str] | None = None,
    *,
    retry_on: re.Pattern[str] = UNREACHABLE,
) -> str:
    message = ""
    for wait_s in (*RETRY_WAITS_S, None):
        try:
            result = subprocess.run(line, env=environment, capture_output=True, text=True)
        except FileNotFoundError:
            raise ValueError(f"{line[0]} is not installed: SLURM's commands are needed") from None
        if result.returncode == 0:
            return result.stdout
        message = f"{line[0]} {line[1]}: {' '.join((result.stderr or result.stdout).split())}"
        if wait_s is None or retry_on.search(message) is None:
            break
        print(f"tvr launch: {message}; retrying in {wait_s} s", file=sys.stderr, flush=True)
        time.sleep(wait_s)
    raise ValueError(message)
