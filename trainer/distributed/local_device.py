"""The device of this rank among the ranks of its machine, and the threads that it may use.

A launcher either shows all GPUs of the machine to every rank, and rank N takes GPU N, or shows each
rank one GPU of its own, as SLURM does with `--gpus-per-task` and `--gpu-bind`. In the second case
the GPU has number 0 on every rank. Its number says nothing about which GPU it is, so the ranks
compare the GPUs' identifiers.
"""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Sequence

import torch

from tvr.launchers.host_limits import host_cpus
from tvr.trainer.errors import PreflightFailed
from tvr.trainer.records import Finding, raise_findings

# `tvr launch` sets it for a job with --gpus-per-node.
GPUS_PER_NODE = "TVR_GPUS_PER_NODE"
LOCAL_RANK, LOCAL_WORLD_SIZE = "LOCAL_RANK", "LOCAL_WORLD_SIZE"


def whole_number(name: str, default: int) -> int:
    """Reads an environment variable.

    Raises:
        ValueError: the variable is not a whole number.
    """
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"environment variable {name}={text!r} must be a whole number") from None


def node_ranks(rank: int, world_size: int) -> range:
    """The ranks of this machine, as the launcher's variables tell; they share its disk.

    A launcher that tells nothing, or whose ranks on a machine are not consecutive, gives a rank
    itself alone. Two such ranks then do not count on each other's downloads.

    Raises:
        ValueError: a variable is not a whole number.
    """
    here = whole_number(LOCAL_WORLD_SIZE, 1)
    first = rank - whole_number(LOCAL_RANK, 0)
    fits = 0 <= first <= rank < first + here <= world_size
    # Ranks dealt out to the machines in turn: the first rank of a machine is no multiple.
    in_turn = world_size % max(1, here) == 0 and first % max(1, here) != 0
    return range(first, first + here) if fits and not in_turn else range(rank, rank + 1)


def select_device(rank: int) -> torch.device:
    """Selects this rank's GPU and makes it torch's current one, or returns the CPU if torch has
    no GPU.

    Raises:
        ValueError: the ranks of this machine see fewer GPUs than they need.
        PreflightFailed: this rank sees fewer GPUs than the job asked for.
    """
    visible = torch.cuda.device_count()
    _check_requested_gpus(rank, visible)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", gpu_index(whole_number(LOCAL_RANK, 0), visible))
    torch.cuda.set_device(device)
    return device


def gpu_index(local_rank: int, visible: int) -> int:
    """Number of a rank's GPU among the `visible` ones.

    A single visible GPU is taken to be the rank's own; `check_own_gpus` then compares the ranks.

    Raises:
        ValueError: there are several GPUs, but none for this rank.
    """
    if local_rank < visible:
        return local_rank
    if visible == 1:
        return 0
    raise ValueError(
        f"local rank {local_rank} has no GPU of its own: it sees {visible} GPUs. Start fewer ranks"
        f" on this machine, let every rank see at least {local_rank + 1} GPUs or exactly one of its"
        " own, or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
    )


def gpu_identity(device: torch.device) -> tuple[str, str]:
    """The host and the identifier of a GPU, which differ for any two GPUs of a job; ("", "") for a
    CPU, which ranks may share."""
    if device.type == "cpu":
        return "", ""
    return socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)


def check_own_gpus(identities: Sequence[tuple[str, str]]) -> None:
    """Checks that no two ranks use the same GPU.

    Args:
        identities: `gpu_identity` of every rank.

    Raises:
        PreflightFailed: names the ranks that share a GPU.
    """
    users = defaultdict[tuple[str, str], list[int]](list)
    for rank, identity in enumerate(identities):
        users[identity].append(rank)
    shared = {identity: ranks for identity, ranks in users.items() if len(ranks) > 1}
    hosts = [host for host, _ in identities]
    # If each host has this fault, the job was started in a wrong way, and no other node helps.
    is_node_fault = len({host for host, _ in shared}) < len(set(hosts))
    raise_findings(
        [
            Finding(
                ranks[1],
                f"shares GPU {uuid} with rank {ranks[0]}, and every rank needs a GPU of its own."
                f" Start fewer ranks on each machine, or check {LOCAL_RANK} and"
                " CUDA_VISIBLE_DEVICES of each rank",
                is_node_fault,
            )
            for (_, uuid), ranks in shared.items()
        ],
        hosts,
    )


def limit_threads() -> None:
    """Keeps torch's threads within the CPU quota of a control group, which torch does not read.

    The kernel stops all threads of a group that has used up its quota, the one that feeds the GPU
    and the one that answers the other ranks included. OMP_NUM_THREADS goes before.
    """
    cpus = host_cpus()
    if cpus.limited_by is None or "OMP_NUM_THREADS" in os.environ:
        return
    own = max(1, cpus.usable // max(1, whole_number(LOCAL_WORLD_SIZE, 1)))
    torch.set_num_threads(min(own, torch.get_num_threads()))


def _check_requested_gpus(rank: int, visible: int) -> None:
    """Refuses to train on the CPU when the job asked for GPUs that this process cannot see."""
    expected = whole_number(GPUS_PER_NODE, 0)
    # Where each rank sees one GPU of its own, the ranks of the machine together have all of them.
    one_each = visible == 1 and whole_number(LOCAL_WORLD_SIZE, 1) >= expected
    if visible >= expected or one_each or os.environ.get("DS_ACCELERATOR") == "cpu":
        return
    raise PreflightFailed(
        [
            f"rank {rank} on {socket.gethostname()} sees {visible} CUDA devices, and the job asked"
            f" for {expected} on each node ({GPUS_PER_NODE}). A CPU build of torch (here:"
            f" {torch.__version__}) or a container without its GPUs (apptainer needs --nv) also"
            " causes this; set DS_ACCELERATOR=cpu to train on the CPU"
        ],
        rank,
    )
