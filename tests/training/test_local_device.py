"""Which GPU a rank takes: number N of all GPUs of the machine, or the one that it alone sees."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed as dist

from tvr.launchers.host_limits import HostCpus
from tvr.trainer.distributed import local_device
from tvr.trainer.distributed.local_device import (
    check_own_gpus,
    gpu_identity,
    gpu_index,
    limit_threads,
    node_ranks,
    select_device,
)
from tvr.trainer.distributed.world import World, join_world
from tvr.trainer.engine.engine import _import_deepspeed
from tvr.trainer.errors import PreflightFailed

HOST = socket.gethostname()
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TVR_GPUS_PER_NODE")


class Machine:
    """A machine on which torch sees GPUs that are not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.selected: list[torch.device] = []

    def rank(self, *, visible: int, **variables: int) -> None:
        """Makes this process a rank of a job, to which `visible` GPUs are shown."""
        cuda = torch.cuda
        self._patch.setattr(cuda, "device_count", lambda: visible)
        self._patch.setattr(cuda, "is_available", lambda: visible > 0)
        self._patch.setattr(cuda, "set_device", self.selected.append)
        self._patch.delenv("DS_ACCELERATOR", raising=False)
        for name in VARIABLES:
            self._patch.delenv(name, raising=False)
            if name in variables:
                self._patch.setenv(name, str(variables[name]))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("variables", "rank", "world_size", "expected"),
    [
        ({"LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 4}, 6, 8, range(4, 8)),
        ({"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4}, 0, 4, range(4)),
        ({}, 5, 8, range(5, 6)),  # a launcher that tells nothing
        ({"LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}, 3, 4, range(2, 4)),
        ({"LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}, 2, 4, range(2, 3)),  # ranks dealt out in turn
        ({"LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 4}, 1, 8, range(1, 2)),
        ({"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4}, 6, 8, range(6, 7)),
        ({"LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 3}, 6, 7, range(6, 7)),
    ],
)
def test_the_ranks_of_a_node(
    machine: Machine, variables: dict[str, int], rank: int, world_size: int, expected: range
) -> None:
    machine.rank(visible=0, **variables)
    assert node_ranks(rank, world_size) == expected


@pytest.mark.parametrize(
    ("local_rank", "visible", "index"), [(0, 1, 0), (3, 8, 3), (7, 8, 7), (3, 1, 0), (0, 8, 0)]
)
def test_a_rank_takes_its_number_or_the_only_gpu(local_rank: int, visible: int, index: int) -> None:
    assert gpu_index(local_rank, visible) == index


@pytest.mark.parametrize(("local_rank", "visible"), [(3, 2), (8, 8), (2, 2)])
def test_several_gpus_without_one_for_the_rank_are_refused(local_rank: int, visible: int) -> None:
    with pytest.raises(
        ValueError, match=f"local rank {local_rank} .* it sees {visible} GPUs"
    ) as no:
        gpu_index(local_rank, visible)
    assert f"at least {local_rank + 1} GPUs or exactly one" in str(no.value)


class Joined(Exception):
    """Stands for the process group, which needs real GPUs."""


def test_join_world_takes_the_one_visible_gpu_of_local_rank_3(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.rank(visible=1, RANK=3, WORLD_SIZE=4, LOCAL_RANK=3, LOCAL_WORLD_SIZE=4)

    def init(backend: str, **options: Any) -> None:
        raise Joined(backend, options["rank"], options["world_size"])

    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", init)
    with pytest.raises(Joined) as joined, join_world():
        pass
    assert joined.value.args == ("cpu:gloo,cuda:nccl", 3, 4)
    assert machine.selected == [torch.device("cuda", 0)]


def test_one_visible_gpu_a_rank_is_what_a_job_with_gpus_asked_for(machine: Machine) -> None:
    machine.rank(visible=1, LOCAL_RANK=3, LOCAL_WORLD_SIZE=4, TVR_GPUS_PER_NODE=4)
    assert select_device(3) == torch.device("cuda", 0)
    # Two ranks for four GPUs, and each sees one: the node shows too few.
    machine.rank(visible=1, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, TVR_GPUS_PER_NODE=4)
    with pytest.raises(PreflightFailed, match="sees 1 CUDA devices, and the job asked for 4"):
        select_device(1)
    # One of four GPUs is missing. On another node the same command would work.
    machine.rank(visible=3, LOCAL_RANK=3, LOCAL_WORLD_SIZE=4, TVR_GPUS_PER_NODE=4)
    with pytest.raises(PreflightFailed, match="sees 3 CUDA devices") as no:
        select_device(3)
    assert no.value.rank == 3
    machine.rank(visible=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=4)
    assert select_device(0) == torch.device("cpu")


def test_ranks_with_gpus_of_their_own_are_accepted() -> None:
    check_own_gpus([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1"), ("b", "GPU-2")])
    check_own_gpus([("a", "GPU-1")])


def test_ranks_that_share_a_gpu_are_named() -> None:
    shared = [("a", "GPU-1"), ("a", "GPU-1"), ("a", "GPU-1")]
    with pytest.raises(PreflightFailed) as no:
        check_own_gpus(shared)
    (line,) = no.value.lines
    assert line.startswith("rank 1 on a: shares GPU GPU-1 with rank 0, and every rank needs")
    assert no.value.rank is None  # the only host: the job was started in a wrong way
    with pytest.raises(PreflightFailed) as no:
        check_own_gpus([("b", "GPU-1"), ("b", "GPU-2"), *shared[:2]])
    assert no.value.rank == 3  # the other host has a GPU for each rank


class ThreeRanks(World):
    """A rank of three that all see the same GPU."""

    def all_gather_objects(self, mine: Any) -> list[Any]:
        return [mine, mine, mine]


def test_the_check_of_the_connection_compares_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(number: torch.Tensor, **_: Any) -> None:
        number.fill_(3)  # 0 + 1 + 2

    gpu = SimpleNamespace(uuid="5ca1ab1e")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(dist, "all_reduce", answer)
    device = torch.device("cuda", 0)
    assert gpu_identity(device) == (HOST, "5ca1ab1e")
    with pytest.raises(PreflightFailed, match=f"rank 1 on {HOST}: shares GPU 5ca1ab1e with rank 0"):
        ThreeRanks(rank=1, world_size=3, device=device).check_connection(1.0)


def test_deepspeed_takes_the_same_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    world = World(rank=3, world_size=4, device=torch.device("cuda", 0))
    deepspeed = _import_deepspeed(world)
    # What its engine does before it calls set_device with the number found.
    engine = SimpleNamespace()
    deepspeed.DeepSpeedEngine._configure_with_arguments(engine, SimpleNamespace(), None)
    assert engine.local_rank == 0
    assert os.environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    ("quota", "ranks", "omp", "threads"),
    [(None, 1, None, 8), (6, 1, None, 6), (6, 4, None, 1), (16, 1, None, 8), (6, 1, "8", 8)],
)
def test_torch_keeps_to_the_cpu_quota(
    monkeypatch: pytest.MonkeyPatch,
    quota: int | None,
    ranks: int,
    omp: str | None,
    threads: int,
) -> None:
    limit = None if quota is None else "/sys/fs/cgroup/cpu.max"
    monkeypatch.setattr(local_device, "host_cpus", lambda: HostCpus(quota or 64, 64, limit))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    now = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[-1])
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    limit_threads()
    assert now[-1] == threads
