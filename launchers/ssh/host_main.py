"""Runs the ranks of one host; the ssh launcher starts it on each.

ssh forwards no signals. Instead, a line or end of file on standard input means that the launcher
was interrupted or has died. The ranks then get SIGTERM, save, and exit.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence

from tvr.launchers.torchrun.launch import run_once


def run_host(
    command: Sequence[str], *, node_rank: int, nodes: int, ranks: int, address: str, port: int
) -> int:
    """Runs the `ranks` ranks of host `node_rank` of `nodes`, and returns their exit code."""
    threading.Thread(target=_terminate_with_launcher, name="launcher", daemon=True).start()
    rendezvous = [
        f"--nnodes={nodes}",
        f"--node-rank={node_rank}",
        f"--master-addr={address}",
        f"--master-port={port}",
    ]
    return run_once(command, ranks=ranks, rendezvous=rendezvous).code


def _terminate_with_launcher() -> None:
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    node_rank, nodes, ranks, address, port, *command = sys.argv[1:]
    sys.exit(
        run_host(
            command,
            node_rank=int(node_rank),
            nodes=int(nodes),
            ranks=int(ranks),
            address=address,
            port=int(port),
        )
    )
