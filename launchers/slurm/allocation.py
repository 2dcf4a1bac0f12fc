"""Resources that SLURM gave to one attempt of a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvr.launchers.slurm.nodelist import expand_nodes

# Below the range of ephemeral ports.
FIRST_PORT, NUM_PORTS = 20000, 12000


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Job ID, nodes and partition of one attempt."""

    job_id: str
    full_id: str
    """ID for SLURM's commands: `JOB`, or `ARRAY_TASK` because an array shares the job ID of one of
    its tasks."""
    restart: int
    nodes: tuple[str, ...]
    partition: str
    task: str | None = None
    """Number of the array task; None without an array."""

    @property
    def port(self) -> int:
        """Rendezvous port. It differs between restarts, as an orphan may hold the previous one."""
        return FIRST_PORT + (int(self.job_id) + 101 * self.restart) % NUM_PORTS


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """Reads the allocation from SLURM's environment variables."""
    job_id, full_id = environment["SLURM_JOB_ID"], "{SLURM_JOB_ID}"
    if "SLURM_ARRAY_JOB_ID" in environment:
        full_id = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}"
    return Allocation(
        job_id=job_id,
        full_id=full_id.format_map(environment),
        restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
        nodes=tuple(expand_nodes(environment["SLURM_JOB_NODELIST"])),
        partition=environment["SLURM_JOB_PARTITION"],
        task=environment.get("SLURM_ARRAY_TASK_ID"),
    )
