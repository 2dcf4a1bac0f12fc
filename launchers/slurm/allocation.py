"""Resources that SLURM gave to one attempt of a job."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tvr.launchers.slurm import commands
from tvr.launchers.slurm.nodelist import expand_nodes

# Below the range of ephemeral ports.
FIRST_PORT, NUM_PORTS = 20000, 12000
# Each variable with the name that old versions of SLURM give it, too.
JOB_ID = ("SLURM_JOB_ID", "SLURM_JOBID")
NODE_LIST = ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
NUM_NODES = ("SLURM_JOB_NUM_NODES", "SLURM_NNODES")


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Job ID, nodes and partition of one attempt."""

    job_id: str
    full_id: str
    """ID for SLURM's commands: `JOB`, or `ARRAY_TASK` because an array shares the job ID of one of
    its tasks."""
    restart: int
    nodes: tuple[str, ...]
    partition: str | None
    task: str | None = None
    """Number of the array task; None without an array."""
    addresses: Mapping[str, str] = field(default_factory=dict)
    """Addresses that SLURM gave for nodes in a cloud."""

    @property
    def port(self) -> int:
        """Rendezvous port. It differs between restarts, as an orphan may hold the previous one."""
        return FIRST_PORT + (int(self.job_id) + 101 * self.restart) % NUM_PORTS


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """Reads the allocation from SLURM's environment variables.

    Raises:
        ValueError: SLURM gave no job ID or no nodes.
    """
    full_id = job_id = _first(environment, JOB_ID)
    if job_id is None:
        raise ValueError("SLURM_JOB_ID is missing: this must run in a batch script of SLURM")
    task = None
    if "SLURM_ARRAY_JOB_ID" in environment:
        task = environment["SLURM_ARRAY_TASK_ID"]
        full_id = f"{environment['SLURM_ARRAY_JOB_ID']}_{task}"
    return Allocation(
        job_id=job_id,
        full_id=full_id or job_id,
        restart=int(environment.get("SLURM_RESTART_COUNT") or 0),
        nodes=tuple(expand_nodes(_node_list(environment, full_id or job_id))),
        partition=environment.get("SLURM_JOB_PARTITION"),
        task=task,
        addresses=_addresses(environment.get("SLURM_NODE_ALIASES", "")),
    )


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((environment[name] for name in names if environment.get(name)), None)


def _node_list(environment: Mapping[str, str], full_id: str) -> str:
    """The job's node list, from its variables or else from the controller."""
    listed = _first(environment, NODE_LIST)
    if listed is not None:
        return listed
    own = environment.get("SLURMD_NODENAME")
    if own and _first(environment, NUM_NODES) == "1":
        return own
    listed = commands.job_state(full_id).nodes
    if not listed:
        raise ValueError(f"SLURM names no nodes of job {full_id}: SLURM_JOB_NODELIST is missing")
    return listed


def _addresses(aliases: str) -> dict[str, str]:
    """Reads `NODE:ADDRESS:HOST,...`; an IPv6 address is in brackets."""
    found = re.findall(r"(?:^|,)([\w.-]+):(\[[^\]]*\]|[^:,]+):", aliases)
    return {node: address.strip("[]") for node, address in found}
