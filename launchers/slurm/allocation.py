"""What SLURM gave one attempt of a job: its number, its nodes, and where its ranks meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvr.launchers.slurm.nodelist import expand_nodes

# Below the ports that systems give out by themselves.
FIRST_PORT, NUM_PORTS = 20000, 12000


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What SLURM gave this attempt."""

    job_id: str
    name: str
    """What SLURM's commands call it: the number of an array is that of one of its tasks, too."""
    restart: int
    nodes: tuple[str, ...]
    partition: str

    @property
    def port(self) -> int:
        """Of the meeting place; another one for each restart, since an orphan may hold the old."""
        return FIRST_PORT + (int(self.job_id) + 101 * self.restart) % NUM_PORTS


def allocation(environment: Mapping[str, str]) -> Allocation:
    """From SLURM's variables."""
    job_id, name = environment["SLURM_JOB_ID"], "{SLURM_JOB_ID}"
    if "SLURM_ARRAY_JOB_ID" in environment:
        name = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}"
    return Allocation(
        job_id=job_id,
        name=name.format_map(environment),
        restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
        nodes=tuple(expand_nodes(environment["SLURM_JOB_NODELIST"])),
        partition=environment["SLURM_JOB_PARTITION"],
    )
