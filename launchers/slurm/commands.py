"""SLURM's commands, with retries, and parsers of their output."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tvr.launchers.slurm.environment import command_environment, submission_environment
from tvr.launchers.slurm.sbatch_reply import (
    ReplyLost,
    SubmittedJob,
    job_of_script,
    only_number,
    read_reply,
)

FINAL_STATES = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "LAUNCH_FAILED",
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
STATE_FORMAT = "JobArrayID:40,State:32,RestartCnt:16,NodeList:2000"
LISTED_STATE = re.compile(r"(\S+)\s+([A-Z_]+)\s+(\d+)\s*(\S*)")
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


def submit_script(
    script: Path,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> SubmittedJob:
    """Submits a batch script.

    Args:
        script: The script.
        options: Options of sbatch that override its lines.
        environment: Variables of the caller; None means this process's. Those that would change
            the job are not passed on.

    Raises:
        ReplyLost: SLURM may have accepted the script, but the ID of its job is unknown.
        ValueError: SLURM rejects the script, is unreachable, or is not installed.
    """
    variables = submission_environment(os.environ if environment is None else environment)
    line = ["sbatch", "--parsable", *options, str(script)]
    try:
        # A retry after a lost reply would submit a second job.
        output = _run(line, variables, retry_on=NOT_CONNECTED)
    except ValueError as error:
        if UNREACHABLE.search(str(error)) is None or NOT_CONNECTED.search(str(error)):
            raise
        if found := _listed_job(script):
            return found
        raise ReplyLost(f"{error}; the job may be queued all the same: see `squeue --me`") from None
    found = read_reply(output) or _listed_job(script) or only_number(output)
    if found is None:
        raise ReplyLost(
            f"sbatch accepted the job, but its output names no job ID: {output.strip()!r}; see"
            " `squeue --me`"
        )
    return found


def _listed_job(script: Path) -> SubmittedJob | None:
    """Asks the queue for the job of a script, whose name is unique."""
    line = ["squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%F %o"]
    try:
        return job_of_script(_run(line), script)
    except ValueError:
        return None


def job_states(job_id: str, cluster: str | None = None) -> list[JobState]:
    """Returns the state of a job, or of every task of an array; `GONE` if SLURM lists neither.

    Where scontrol fails or is missing, squeue answers.
    """
    try:
        text = _run(["scontrol", "--oneliner", *_on(cluster), "show", "job", job_id])
        # A wrapper, or the choice of a cluster, may add other lines.
        states = [_job_state(line) for line in text.splitlines() if _field(line, "JobState")]
        if not states:
            raise ValueError(f"scontrol shows no job {job_id}: {text.strip()!r}")
    except ValueError as error:
        if "Invalid job id" in str(error):
            return [JobState(job_id=job_id, state=GONE, restarts=0, reason="", nodes="")]
        states = _listed_states(job_id, cluster)
        if not states:
            raise
    return states


def job_state(job_id: str) -> JobState:
    """Returns the state of one job or array task."""
    return job_states(job_id)[0]


def _listed_states(job_id: str, cluster: str | None) -> list[JobState]:
    line = ["squeue", "--noheader", "--states=all", *_on(cluster), f"--jobs={job_id}"]
    try:
        listed = _run([*line, f"--Format={STATE_FORMAT}"])
    except ValueError:
        return []
    return [
        JobState(job_id=found[1], state=found[2], restarts=int(found[3]), reason="", nodes=found[4])
        for line in listed.splitlines()
        if (found := LISTED_STATE.fullmatch(line.strip()))
    ]


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
        started = [_unix_time(_field(line, field)) for field in ("BootTime", "SlurmdStartTime")]
        if DOWN.search(state) or any(time_s > since_s for time_s in started):
            return node
    return None


def _show_nodes(nodes: Sequence[str]) -> str:
    environment = command_environment(os.environ) | {"SLURM_TIME_FORMAT": "%s"}
    return _run(["scontrol", "--oneliner", "show", "node", ",".join(nodes)], environment)


def _unix_time(text: str | None) -> float:
    """Reads a time of scontrol; 0 if it is unknown. Old versions know SLURM's own format only."""
    if text is None or text.isdecimal():
        return float(text or 0)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def _field(text: str, field: str) -> str | None:
    match = re.search(rf"\b{field}=(\S+)", text)
    return match[1] if match else None


def usable_nodes(partition: str | None) -> set[str]:
    """Returns the nodes of a partition, or of any one, that a job may get now or later."""
    of_partition = [] if partition is None else ["-p", partition]
    lines = _run(["sinfo", "-h", "-N", *of_partition, "-o", "%N %T"]).splitlines()
    nodes = [words for line in lines if len(words := line.split()) == 2]
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


def cancel_job(job_id: str, cluster: str | None = None) -> None:
    """Ends a pending or running job."""
    _run(["scancel", *_on(cluster), job_id])


def _on(cluster: str | None) -> list[str]:
    return [] if cluster is None else [f"--clusters={cluster}"]


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
    environment = command_environment(os.environ) if environment is None else environment
    for wait_s in (*RETRY_WAITS_S, None):
        try:
            # A wrapper may print text in any encoding.
            result = subprocess.run(
                line, env=environment, capture_output=True, encoding="utf-8", errors="replace"
            )
        except (FileNotFoundError, PermissionError):
            raise ValueError(f"{line[0]} is not installed: SLURM's commands are needed") from None
        if result.returncode == 0:
            return result.stdout
        message = f"{line[0]} {line[1]}: {' '.join((result.stderr or result.stdout).split())}"
        if wait_s is None or retry_on.search(message) is None:
            break
        print(f"tvr launch: {message}; retrying in {wait_s} s", file=sys.stderr, flush=True)
        time.sleep(wait_s)
    raise ValueError(message)
