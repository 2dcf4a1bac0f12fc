"""This process among the ranks of its job, and collectives on small Python values.

The door of the package. `join_world` starts the process group; everything else takes the `World`.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from tvr.trainer.distributed.flight_recorder import enable_flight_recorder
from tvr.trainer.distributed.local_device import (
    check_own_gpus,
    gpu_identity,
    limit_threads,
    node_ranks,
    select_device,
    whole_number,
)
from tvr.trainer.distributed.wait_points import COLLECTIVE_FUNCTIONS, WaitPoints
from tvr.trainer.errors import PreflightFailed
from tvr.trainer.versions.versions import renamed

# Long enough for a rank that still compiles or reads its first shard.
TIMEOUT_S = 1800.0
# Time-out of the first all-reduce, which proves that the ranks reach each other.
CONNECT_TIMEOUT_S = 120.0
# Work whose duration depends on the size of a checkpoint has no useful time-out. Ranks that wait
# for it still notice a rank that dies: gloo then loses a connection.
PATIENCE = timedelta(days=30)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """One process of a job: `rank` of `world_size`, and its device."""

    rank: int
    world_size: int
    device: torch.device
    received_bytes: Counter[str] = field(default_factory=Counter, compare=False, repr=False)
    """Bytes received in collectives of features, gradients and statistics, by COLLECTIVES."""
    wait_points: WaitPoints = field(default_factory=WaitPoints, compare=False, repr=False)
    """The collectives that this rank has entered: its own and DeepSpeed's."""
    node: range | None = None
    """The ranks of this machine; None = all ranks."""

    @property
    def is_first(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until every rank calls it."""
        if self.world_size > 1:
            dist.barrier()

    def check_connection(self, timeout_s: float) -> None:
        """All-reduces the rank numbers, on the host and on the device.

        Raises:
            PreflightFailed: the time is up, the sum is wrong, or two ranks use the same GPU; names
                rank, host and device.
        """
        # Before the ranks wait for each other: a GPU that does not answer raises here.
        own_gpu = gpu_identity(self.device)
        # A list, not a set: every rank must use the same order.
        for device in dict.fromkeys((torch.device("cpu"), self.device)):
            if device.type == "cuda":
                # NCCL's own message about ranks that share a GPU names neither rank nor remedy.
                check_own_gpus(self.all_gather_objects(own_gpu))
            number = torch.tensor([self.rank], dtype=torch.int64, device=device)
            try:
                work = dist.all_reduce(number, async_op=True)
                if work is not None:
                    work.wait(timedelta(seconds=timeout_s))
                found = int(number)
                self.wait_points.synchronised()
            except RuntimeError as error:
                found = " ".join(str(error).split())
            if found != sum(range(self.world_size)):
                line = (
                    f"rank {self.rank} on {socket.gethostname()} cannot reach the other"
                    f" {self.world_size - 1} on {device.type}: the sum of all ranks should be"
                    f" {sum(range(self.world_size))}, and the all-reduce gave {found}. Set"
                    " GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface that"
                    " reaches all nodes"
                )
                raise PreflightFailed([line], self.rank)

    def all_gather_objects(self, mine: Any) -> list[Any]:
        """Returns every rank's small picklable object, in rank order, on every rank."""
        if self.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine)
        return everyone

    def gather_objects_to_first(self, mine: Any) -> list[Any] | None:
        """Returns every rank's picklable object, in rank order, on rank 0; None on the others."""
        if self.world_size == 1:
            return [mine]
        everyone: list[Any] | None = [None] * self.world_size if self.is_first else None
        dist.gather_object(mine, everyone, dst=0)
        return everyone

    def all_gather_counts(self, count: int) -> tuple[int, ...]:
        """Returns every rank's integer, in rank order, on every rank."""
        if self.world_size == 1:
            return (count,)
        # On the host, so that the GPU's queue of work need not be drained.
        counts = torch.zeros(self.world_size, dtype=torch.int64)
        renamed(dist, "all_gather_single")(counts, torch.tensor([count], dtype=torch.int64))
        return tuple(counts.tolist())

    def all_gather_numbers(self, mine: Sequence[float]) -> list[list[float]]:
        """Returns every rank's few numbers, in rank order, on every rank; each rank gives as many.

        Like all flags of the ranks they go from host to host over gloo, so that no rank waits for
        its GPU. Whole numbers are exact up to 2**53.
        """
        if self.world_size == 1:
            return [[float(number) for number in mine]]
        own = torch.tensor(mine, dtype=torch.float64)
        everyones = own.new_empty(self.world_size * len(own))
        renamed(dist, "all_gather_single")(everyones, own)
        return everyones.view(self.world_size, -1).tolist()

    def run_on_all(self, action: Callable[[], T], error_type: type[Exception]) -> T:
        """Runs `action` on every rank and returns this rank's result.

        An `error_type` on any rank is raised on every rank; with several, the lowest rank's.
        """
        raised: Exception | None = None
        try:
            value = action()
        except error_type as error:
            value, raised = None, error
        self.raise_first(raised, self.all_gather_counts(raised is None))
        return cast(T, value)

    def raise_first(self, raised: Exception | None, is_ok: Sequence[float]) -> None:
        """Raises the error of the lowest failing rank on every rank; nothing if all are well.

        Args:
            raised: This rank's error, if it has one.
            is_ok: 0 for each rank that has an error, by rank; the same on every rank.
        """
        failing = [rank for rank, ok in enumerate(is_ok) if not ok]
        if failing:
            raise self.all_gather_objects(raised)[failing[0]]

    def run_on_first(self, action: Callable[[], T], *, patient: bool = False) -> T:
        """Runs `action` on rank 0 and broadcasts its result, or raises its error on every rank.

        Args:
            patient: The other ranks wait for as long as `action` takes, beyond the time-out of
                collectives.
        """
        if self.world_size == 1:
            return action()
        outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
        with _patient_group() if patient else nullcontext() as group:
            if self.is_first:
                try:
                    outcome = [(action(), None)]
                except Exception as error:
                    outcome = [(None, error)]
            # A gather would send every rank as many copies of the result as there are ranks.
            dist.broadcast_object_list(outcome, src=0, group=group)
        value, error = outcome[0]
        if error is not None:
            raise error
        return cast(T, value)

    def broadcast_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrites the tensors by those of rank 0; no gradient.

        All ranks pass tensors of equal shapes and types, in the same order.
        """
        if self.world_size == 1:
            return
        for tensor in tensors:
            values = tensor.detach().contiguous()
            dist.broadcast(values, src=0)
            if values.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(values)


@contextmanager
def join_world(timeout_s: float = TIMEOUT_S) -> Iterator[World]:
    """Joins the process group of the ranks that torchrun or srun started, and leaves it at the end.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without RANK the process forms
    a group of one, which DeepSpeed needs.

    Args:
        timeout_s: A collective that waits longer than this for another rank raises.

    Raises:
        ValueError: a variable is not a whole number, or of several visible GPUs none is this
            rank's.
        PreflightFailed: this node shows fewer GPUs than the job asked for, or the ranks cannot
            reach each other.
    """
    rank, world_size = whole_number("RANK", 0), whole_number("WORLD_SIZE", 1)
    device = select_device(rank)
    limit_threads()
    # gloo carries small host-side values, NCCL the tensors of the device.
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        enable_flight_recorder()
    leave = False
    if not dist.is_initialized():
        if "RANK" in os.environ:
            leave = True
            dist.init_process_group(
                backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
            )
        else:
            # In memory, so that a group of one opens no port. (Public in torch, not in __all__.)
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    node = node_ranks(rank, world_size)
    world = World(rank=rank, world_size=world_size, device=device, node=node)
    with _counted_collectives(world.wait_points):
        world.check_connection(min(CONNECT_TIMEOUT_S, timeout_s))
        yield world
        # Skipped after an error: the process ends, and a barrier with ranks that hang would hang.
        world.barrier()  # a rank that leaves first would break the others' last collective
    # A group of one stays: DeepSpeed keeps a reference to the first group that it saw.
    if leave:
        dist.destroy_process_group()


@contextmanager
def _patient_group() -> Iterator[dist.ProcessGroup]:
    """A group of all ranks, for values on the host, whose collectives wait for `PATIENCE`."""
    dist.barrier()  # with the usual time-out: creating the group would wait for a dead rank
    group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
    yield group
    # Skipped after an error, as in `join_world`.
    dist.destroy_process_group(group)


@contextmanager
def _counted_collectives(wait_points: WaitPoints) -> Iterator[None]:
    """Counts the calls of torch.distributed's collectives during the block.

    The functions are replaced in torch's module, because DeepSpeed calls them there; without its
    collectives, ranks that wait in a backward or an update would look alike.
    """
    found = {name: getattr(dist, name) for name in COLLECTIVE_FUNCTIONS if hasattr(dist, name)}
    try:
        for name, function in found.items():
            setattr(dist, name, wait_points.counting(name, function, _members_of))
        yield
    finally:
        for name, function in found.items():
            setattr(dist, name, function)


def _members_of(group: dist.ProcessGroup | None) -> list[int]:
    """The ranks of a group, None meaning all; no rank if this process is not a member."""
    is_member = group is None or isinstance(group, dist.ProcessGroup)
    return dist.get_process_group_ranks(group) if is_member else []


def is_connection_error(error: BaseException) -> bool:
    """True if a collective failed because another rank is gone or did not join in time."""
    # gloo raises a plain RuntimeError, which names a file of its source.
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )
