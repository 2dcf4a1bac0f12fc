"""Numbers that the ranks of one machine share: each writes its own line, any of them reads all."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tvr.trainer.distributed.world import World

IN_MEMORY = Path("/dev/shm")
BOOT = Path("/proc/sys/kernel/random/boot_id")


def ranks_on_node(world: World) -> list[int]:
    """The ranks on this rank's machine, in order. All ranks call it."""
    nodes = world.all_gather_objects(_node())
    return [rank for rank, node in enumerate(nodes) if node == nodes[world.rank]]


def shared_rows(world: World, ranks: list[int], length: int) -> Mapping[int, np.ndarray]:
    """A line of `length` numbers for each of `ranks`, which are those here. All ranks call it.

    The memory is there as long as one of them lives, under no name: none leaves it behind.
    """
    shape, mine = (len(ranks), length), None
    if world.rank == ranks[0]:
        place = IN_MEMORY if IN_MEMORY.is_dir() else None
        descriptor, mine = tempfile.mkstemp(prefix="tvr-metrics-", dir=place)
        os.truncate(descriptor, max(1, len(ranks) * length) * 8)
        os.close(descriptor)
    path = world.all_gather_objects(mine)[ranks[0]]
    lines = np.memmap(path, dtype=np.float64, mode="r+", shape=shape)
    world.barrier()
    if mine is not None:
        os.unlink(mine)
    return dict(zip(ranks, lines, strict=True))


def _node() -> str:
    # Two machines may have one name, and two containers one kernel.
    boot = BOOT.read_text().strip() if BOOT.exists() else ""
    return f"{socket.gethostname()} {boot}"
