"""What a launcher starts over ssh on each host: the ranks of this host, until the line breaks.

ssh hands on no signals. A line on standard input, or its end, tells this process that the launcher
was told to leave, or is gone; the ranks then get SIGTERM, save, and leave.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence

from tvr.launchers.torchrun.launch import run_once


def run_node(
    command: Sequence[str], *, node_rank: int, nodes: int, ranks: int, address: str, port: int
) -> int:
    """Runs the ranks of one of `nodes` hosts; their exit code."""
    threading.Thread(target=_leave_when_told, name="launcher", daemon=True).start()
    agents = [
        f"--nnodes={nodes}",
        f"--node-rank={node_rank}",
        f"--master-addr={address}",
        f"--master-port={port}",
    ]
    return run_once(command, ranks=ranks, agents=agents).code


def _leave_when_told() -> None:
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    node_rank, nodes, ranks, address, port, *command = sys.argv[1:]
    sys.exit(
        run_node(
            command,
            node_rank=int(node_rank),
            nodes=int(nodes),
            ranks=int(ranks),
            address=address,
            port=int(port),
        )
    )
