"""SLURM's commands: what is asked of them, and what they answer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# States in which a job is over for good.
OVER = {
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
"""Our word for a job that SLURM has forgotten: it keeps those that ended some minutes."""
UNREACHABLE = re.compile(
    r"Unable to contact slurm controller|Socket timed out on send/recv|Zero Bytes were transmitted"
)
# Where no connection came about, nothing was done; otherwise an answer may have been lost.
NOT_CONNECTED = re.compile(r"Unable to contact slurm controller \(connect failure\)")
ALREADY_QUEUED = "Job is pending execution"
DOWN = re.compile(r"DOWN|FAIL|\*")
# Beside these, nodes that get no more jobs.
USABLE = re.compile(r"(idle|mixed|allocated|completing|reserved|planned)[~#@%^$!+-]?")
# What becomes of a job must not depend on a controller that is just being restarted.
WAITS_S = (5, 10, 20, 40, 80, 160)
TASK_ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)")
NODE_FAILED = re.compile(r"srun: error: Node failure on (\S+)")
EXITED = re.compile(r"Exited with exit code (\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """One job, or one task of an array."""

    job_id: str
    state: str
    """SLURM's word, such as RUNNING."""
    restarts: int
    reason: str
    """Why it waits; `None` in SLURM's words where it does not."""
    nodes: str
    """Node list; empty before it runs."""

    @property
    def is_over(self) -> bool:
        return self.state in OVER or self.state == GONE


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEnd:
    """The first rank of which srun says that it ended badly."""

    node: str
    rank: int | None
    """None: the node itself failed."""
    what: str
    """In srun's words, such as `Killed`."""

    @property
    def exit_code(self) -> int | None:
        """None: a signal ended it."""
        match = EXITED.fullmatch(self.what)
        return int(match[1]) if match else None


def submit(script: Path) -> str:
    """The job's number.

    Raises:
        ValueError: SLURM refuses it, in its words, or is not there.
    """
    # Variables of a job from within which this one is submitted would change it.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }
    # Asked twice, SLURM would start two jobs.
    answer = _run(["sbatch", "--parsable", str(script)], environment, ask_again=NOT_CONNECTED)
    return answer.strip().split(";")[0]


def job_states(job_id: str) -> list[JobState]:
    """Of a job, or of all tasks of an array; GONE if SLURM does not know it any more."""
    try:
        text = _run(["scontrol", "--oneliner", "show", "job", job_id])
    except ValueError as error:
        if "Invalid job id" in str(error):
            return [JobState(job_id=job_id, state=GONE, restarts=0, reason="", nodes="")]
        raise
    return [_job_state(line) for line in text.splitlines() if line.strip()]


def node_field(node: str, field: str) -> str:
    """What `scontrol show node` has of a node: NodeAddr, State; times as Unix times."""
    environment = os.environ | {"SLURM_TIME_FORMAT": "%s"}
    text = _run(["scontrol", "--oneliner", "show", "node", node], environment)
    match = re.search(rf"\b{field}=(\S+)", text)
    if match is None:
        raise ValueError(f"scontrol shows no {field} of node {node}: {text.strip()}")
    return match[1]


def has_failed(node: str, since_s: float) -> bool:
    """Whether a node is down, or was since that Unix time: it or its daemon started anew."""
    if DOWN.search(node_field(node, "State")):
        return True
    started = [node_field(node, field) for field in ("BootTime", "SlurmdStartTime")]
    return any(time.isdecimal() and int(time) > since_s for time in started)


def usable_nodes(partition: str) -> set[str]:
    """Those that a job may get now or later."""
    lines = _run(["sinfo", "-h", "-N", "-p", partition, "-o", "%N %T"]).splitlines()
    found = [line.split() for line in lines if line.strip()]
    return {node for node, state in found if USABLE.fullmatch(state)}


def requeue(job_id: str) -> None:
    """Ends this job, whose batch shell calls it, and queues it again."""
    try:
        _run(["scontrol", "requeue", job_id])
    except ValueError as error:
        # Asked again after an answer that was lost.
        if ALREADY_QUEUED not in str(error):
            raise


def change_queued(job_id: str, wait_s: float, exclude: Iterable[str] | None) -> None:
    """Sets when a job starts at the earliest, and the nodes it does without; none: as before."""
    # A job that runs takes no such changes; queued again, it takes them while it still ends.
    changes = [f"StartTime=now+{wait_s:.0f}"] if wait_s else []
    changes += [] if exclude is None else [f"ExcNodeList={','.join(exclude)}"]
    if changes:
        _run(["scontrol", "update", f"JobId={job_id}", *changes])


def cancel(job_id: str) -> None:
    """Ends a job wherever it is."""
    _run(["scancel", job_id])


def first_bad_end(words: str) -> TaskEnd | None:
    """What srun said first of a rank or a node that failed; none: nothing."""
    for line in words.splitlines():
        if match := TASK_ENDED.search(line):
            rank = int(re.split(r"[,-]", match[2])[0])
            return TaskEnd(node=match[1], rank=rank, what=match[3].strip())
        if match := NODE_FAILED.search(line):
            return TaskEnd(node=match[1].rstrip(","), rank=None, what="the node failed")
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
    ask_again: re.Pattern[str] = UNREACHABLE,
) -> str:
    said = ""
    for wait_s in (*WAITS_S, None):
        try:
            ended = subprocess.run(line, env=environment, capture_output=True, text=True)
        except FileNotFoundError:
            raise ValueError(f"{line[0]} is not here: this needs the commands of SLURM") from None
        if ended.returncode == 0:
            return ended.stdout
        said = f"{line[0]} {line[1]}: {' '.join((ended.stderr or ended.stdout).split())}"
        if wait_s is None or ask_again.search(said) is None:
            break
        print(f"tvr launch: {said}; asks again in {wait_s} s", file=sys.stderr, flush=True)
        time.sleep(wait_s)
    raise ValueError(said)
