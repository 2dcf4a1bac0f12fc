"""Numbers in memory that the ranks of one machine share: each rank writes a row, any reads all."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tvr.trainer.distributed.world import World

IN_MEMORY = Path("/dev/shm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def machines(world: World) -> list[str]:
    """The machine of each rank. All ranks call it."""
    return world.all_gather_objects(_node_id())


def ranks_on_node(world: World, nodes: list[str] | None = None) -> list[int]:
    """The ranks on this rank's machine, in order. All ranks call it.

    Args:
        world: The ranks.
        nodes: The machine of each rank, from `machines`; None asks for them.
    """
    nodes = machines(world) if nodes is None else nodes
    return [rank for rank, node in enumerate(nodes) if node == nodes[world.rank]]


def shared_rows(world: World, ranks: list[int], length: int) -> Mapping[int, np.ndarray]:
    """Allocates a row of `length` float64 numbers for each rank on this machine.

    All ranks call it. The memory lives as long as one of the processes: its file has no name after
    this call, so a killed process leaves nothing behind.

    Args:
        ranks: Ranks on this machine, from `ranks_on_node`.
    """
    shape, path = (len(ranks), length), None
    if world.rank == ranks[0]:
        folder = IN_MEMORY if IN_MEMORY.is_dir() else None
        descriptor, path = tempfile.mkstemp(prefix="tvr-metrics-", dir=folder)
        os.truncate(descriptor, max(1, len(ranks) * length) * 8)
        os.close(descriptor)
    shared_path = world.all_gather_objects(path)[ranks[0]]
    rows = np.memmap(shared_path, dtype=np.float64, mode="r+", shape=shape)
    world.barrier()
    if path is not None:
        os.unlink(path)
    return dict(zip(ranks, rows, strict=True))


def _node_id() -> str:
    # Two machines may share a host name, and two containers a kernel: both together are unique.
    boot_id = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    return f"{socket.gethostname()} {boot_id}"
