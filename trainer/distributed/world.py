"""Who this process is among the ranks of a job, and what all ranks agree on."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from tvr.trainer.errors import PreflightFailed

# The slowest rank may still be compiling or reading its first shard.
TIMEOUT_S = 1800.0
# By then ranks that have joined have also added up a number, or they never will.
CONNECT_TIMEOUT_S = 120.0

# By `tvr launch`, of a job with --gpus-per-node.
GPUS_PER_NODE = "TVR_GPUS_PER_NODE"

RECEIVED = ("all_gather", "reduce_scatter", "all_reduce", "ring")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """One process's place: `rank` of `world_size`, and its device."""

    rank: int
    world_size: int
    device: torch.device
    received_bytes: Counter[str] = field(default_factory=Counter, compare=False, repr=False)
    """Bytes that came by collectives of features, gradients and statistics, by RECEIVED."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def check_connection(self, timeout_s: float) -> None:
        """Adds up the ranks' numbers, on the host and on the device.

        Raises:
            PreflightFailed: it takes longer, or the sum is wrong; names rank, host and device.
        """
        for device in dict.fromkeys(
            (torch.device("cpu"), self.device)
        ):  # in one order on all ranks
            number = torch.tensor([self.rank], dtype=torch.int64, device=device)
            try:
                work = dist.all_reduce(number, async_op=True)
                if work is not None:
                    work.wait(timedelta(seconds=timeout_s))
                found = int(number)
            except RuntimeError as error:
                found = " ".join(str(error).split())
            if found != sum(range(self.world_size)):
                line = (
                    f"rank {self.rank} on {socket.gethostname()} does not meet the other"
                    f" {self.world_size - 1} on {device.type}: their numbers add up to"
                    f" {sum(range(self.world_size))}, and it got {found}. GLOO_SOCKET_IFNAME and"
                    " NCCL_SOCKET_IFNAME name the network interface that reaches all of them"
                )
                raise PreflightFailed([line], self.rank)

    def all_gather_objects(self, mine: Any) -> list[Any]:
        """Every rank's small picklable object, in rank order, on every rank."""
        if self.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine)
        return everyone

    def all_gather_counts(self, count: int) -> tuple[int, ...]:
        """Every rank's small whole number, in rank order, on every rank."""
        if self.world_size == 1:
            return (count,)
        # On the host, so that no queue of a GPU's work has to run dry for it.
        counts = torch.zeros(self.world_size, dtype=torch.int64)
        dist.all_gather_single(counts, torch.tensor([count], dtype=torch.int64))
        return tuple(counts.tolist())

    def run_on_all(self, action: Callable[[], T], refusal: type[Exception]) -> T:
        """`action`'s result on this rank; a `refusal` on any rank is raised on every rank.

        Where several refuse, the lowest rank's is raised.
        """
        refused: Exception | None = None
        try:
            value = action()
        except refusal as error:
            value, refused = None, error
        rank = self.first_failing_rank(refused is None)
        if rank is not None:
            raise self.all_gather_objects(refused)[rank]
        return cast(T, value)

    def run_on_first(self, action: Callable[[], T]) -> T:
        """Rank 0's result of `action` on every rank; its exception is raised on every rank too."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.is_first:
            try:
                outcome = (action(), None)
            except Exception as error:
                outcome = (None, error)
        value, error = self.all_gather_objects(outcome)[0]
        if error is not None:
            raise error
        return value

    def first_failing_rank(self, fine: torch.Tensor | bool) -> int | None:
        """The lowest rank whose `fine` is false, the same answer on every rank; none: all fine."""
        flag = torch.as_tensor(fine, device=self.device).reshape(1).to(torch.int32)
        flags = [torch.empty_like(flag) for _ in range(self.world_size)]
        if self.world_size == 1:
            flags = [flag]
        else:
            dist.all_gather(flags, flag)
        failing = (torch.cat(flags) == 0).nonzero().flatten().tolist()
        return failing[0] if failing else None


@contextmanager
def join_world(timeout_s: float = TIMEOUT_S) -> Iterator[World]:
    """Joins the ranks that torchrun or srun started, or stands alone; leaves them at the end.

    A collective that waits for another rank longer than `timeout_s` raises. Reads RANK, WORLD_SIZE,
    LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without RANK the process is its own world of one, in a
    group of one, which DeepSpeed needs.

    Raises:
        ValueError: a variable is no number, or this machine has GPUs but fewer than ranks.
        PreflightFailed: this rank's node shows fewer GPUs than the job was given, or the ranks do
            not reach each other.
    """
    rank, world_size, local_rank = (_number(n, d) for n, d in _PLACE)
    _check_gpus(rank)
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU of its own: this machine shows "
                f"{torch.cuda.device_count()}; start fewer ranks, or set CUDA_VISIBLE_DEVICES= "
                "(empty) to train on the CPU"
            )
        # Small host-side agreements go by gloo, tensors of the device by NCCL.
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    leave = False
    if not dist.is_initialized():
        if "RANK" in os.environ:
            leave = True
            dist.init_process_group(
                backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
            )
        else:
            # In memory: a world of one opens no port. (torch has it public and out of __all__.)
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    world = World(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)
    world.check_connection(min(CONNECT_TIMEOUT_S, timeout_s))
    yield world
    # Not after an error: the process ends, and taking leave of ranks that hang would hang too.
    world.barrier()  # a rank that leaves first would break the others' last collective
    # A lone process keeps its group of one: DeepSpeed holds on to the first group it saw.
    if leave:
        dist.destroy_process_group()


def is_connection_error(error: BaseException) -> bool:
    """Whether a collective failed since another rank is gone or does not come."""
    # What gloo throws comes as a plain RuntimeError that names a file of its source.
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )


def _check_gpus(rank: int) -> None:
    """A job that asked for GPUs must not train on the CPU for want of a driver or an option."""
    expected, seen = _number(GPUS_PER_NODE, 0), torch.cuda.device_count()
    if seen >= expected or os.environ.get("DS_ACCELERATOR") == "cpu":
        return
    raise PreflightFailed(
        [
            f"rank {rank} on {socket.gethostname()} sees {seen} CUDA devices, and the job asked for"
            f" {expected} on each node ({GPUS_PER_NODE}). A CPU build of torch (here:"
            f" {torch.__version__}) and a container without its GPUs (apptainer's --nv) look like"
            " this, too; DS_ACCELERATOR=cpu says that the CPU is meant"
        ],
        rank,
    )


_PLACE = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"environment variable {name}={text!r} must be a whole number") from None
