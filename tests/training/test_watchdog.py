"""The watchdog's limit, the rank that it reports as the cause of a stall, and what it writes."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from builders.spawn import spawn, started
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch._subclasses import FakeTensorMode
from torch.distributed.flight_recorder.components.loader import read_dump
from torch.testing._internal.distributed.fake_pg import FakeStore

from tvr.trainer.config import TrainConfig
from tvr.trainer.distributed import flight_recorder
from tvr.trainer.distributed.collectives import all_gather_rows, loss_collectives
from tvr.trainer.distributed.exchange import RingExchange
from tvr.trainer.distributed.wait_points import WaitPoints
from tvr.trainer.distributed.world import join_world
from tvr.trainer.resilience.failure_file import FailureFile
from tvr.trainer.resilience.stalled_ranks import (
    Phase,
    RankStatus,
    find_stalled_ranks,
    rank_at_fault,
)
from tvr.trainer.resilience.watchdog import running_watchdog, stall_limit_s

HOSTS = ["a", "a", "b"]
ALL, PAIR = (0, 1, 2), (1, 2)
WAITING = "all_reduce, collective 40"


def status(rank: int, **changes: Any) -> RankStatus:
    fields: dict[str, Any] = {
        "step": 12,
        "phase": "training",
        "line": "step:9 take",
        "entered": {"": 40},
        "members": {"": ALL},
        "waiting": WAITING,
    }
    return RankStatus(rank=rank, host=HOSTS[rank], **{**fields, **changes})


def in_groups(rank: int, *, everyone: int, pair: int, waiting: str | None) -> RankStatus:
    """A status in a job in which ranks 1 and 2 have a second group."""
    entered = {"": everyone, "pair": pair} if rank in PAIR else {"": everyone}
    members = {"": ALL, "pair": PAIR} if rank in PAIR else {"": ALL}
    return status(rank, entered=entered, members=members, waiting=waiting)


@pytest.mark.parametrize(
    ("phase", "times", "limit"),
    [
        ("start", [], 1800.0),
        ("training", [1.0, 1.0], 900.0),  # the first steps compile and read
        ("training", [50.0, 1.0, 1.0], 300.0),  # a file system may pause for minutes
        ("training", [50.0, 19.0, 20.0], 400.0),
        ("training", [100.0] * 9, 900.0),
        ("evaluation", [1.0] * 9, 900.0),
        ("checkpoint", [1.0] * 9, 900.0),
    ],
)
def test_limit_follows_the_median_step_within_bounds(
    phase: Phase, times: list[float], limit: float
) -> None:
    train = TrainConfig(steps=1, global_batch=1, micro_batch=1, timeout_s=900.0)
    assert stall_limit_s(train, phase, times) == limit


def test_shortest_stall_is_a_setting() -> None:
    train = TrainConfig(steps=1, global_batch=1, micro_batch=1, stall_min_s=7.0)
    assert stall_limit_s(train, "training", [0.1] * 9) == 7.0
    assert stall_limit_s(train, "training", [1.0] * 9) == 20.0


def test_rank_without_a_status_is_the_cause() -> None:
    stalled, text = find_stalled_ranks({0: status(0), 1: status(1, step=11)}, HOSTS)
    assert stalled == [2]
    assert text.startswith(
        "rank 2 on b does not respond (suspended or dead); the other ranks wait in training after"
    )


@pytest.mark.parametrize(
    "behind",
    [
        {"entered": {"": 39}, "line": "stream:3 read", "waiting": None},
        # A GPU that hangs: the host waits for the result of an earlier collective.
        {"entered": {"": 39}, "waiting": "all_gather, collective 39"},
        {"entered": {}, "members": {}, "waiting": None},
        {"step": 11, "line": "stream:3 read"},
        {"phase": "evaluation", "line": "stream:3 read"},
        {"line": "stream:3 read", "waiting": None},
    ],
)
def test_rank_that_the_others_wait_for_is_the_cause(behind: dict[str, Any]) -> None:
    known = {0: status(0), 1: status(1, **behind), 2: status(2)}
    stalled, text = find_stalled_ranks(known, HOSTS)
    assert stalled == [1]
    assert text == (
        f"rank 1 on a is behind, {known[1].text()}; the other ranks wait in training after step 12"
        f" (step:9 take, waiting since {WAITING})"
    )
    assert rank_at_fault(stalled, HOSTS) == 1


def test_count_decides_even_if_steps_say_otherwise() -> None:
    # Rank 0 has read its step's values; the others have not, and wait for rank 0 in the next one.
    known = {0: status(0, entered={"": 39}, step=13), 1: status(1), 2: status(2)}
    assert find_stalled_ranks(known, HOSTS)[0] == [0]


def test_no_rank_is_the_cause_if_all_are_equally_far_on_different_lines() -> None:
    lines = ["step:9 take", "world:5 tolist", "engine:7 norm"]
    known = {rank: status(rank, line=line) for rank, line in enumerate(lines)}
    stalled, text = find_stalled_ranks(known, HOSTS)
    assert stalled == []
    assert rank_at_fault(stalled, HOSTS) is None
    assert text.startswith(
        "no rank is behind the others, so none is named as the cause and no node is excluded; all"
        " ranks are in training after step 12 (engine:7 norm, waiting since all_reduce"
    )
    assert all(line in text for line in lines)


def test_rank_that_waits_for_a_third_rank_is_not_the_cause() -> None:
    known = {
        0: in_groups(0, everyone=8, pair=0, waiting="all_reduce"),
        1: in_groups(1, everyone=7, pair=5, waiting="broadcast"),
        2: in_groups(2, everyone=7, pair=4, waiting=None),
    }
    assert find_stalled_ranks(known, HOSTS)[0] == [2]
    # A circle: each of them waits for the other, and no node is at fault.
    known[1] = in_groups(1, everyone=7, pair=4, waiting="all_reduce")
    known[2] = in_groups(2, everyone=6, pair=5, waiting="broadcast")
    known[0] = in_groups(0, everyone=6, pair=0, waiting=None)
    assert find_stalled_ranks(known, HOSTS)[0] == [0]
    known[0] = in_groups(0, everyone=7, pair=0, waiting="all_reduce")
    assert find_stalled_ranks(known, HOSTS)[0] == []


def test_ranks_on_several_nodes_cost_no_node() -> None:
    assert rank_at_fault([0, 1], HOSTS) == 0
    assert rank_at_fault([1, 2], HOSTS) is None


def test_single_rank_waits_for_no_other() -> None:
    stalled, text = find_stalled_ranks({0: status(0, waiting=None)}, ["a"])
    assert (stalled, text) == ([0], "rank 0 on a is in training after step 12 (step:9 take)")


# ------------------------------------------------------ counts of collectives


def enter_collectives(rank: int, world_size: int) -> dict[str, Any]:
    """How far each kind of collective advances the count, and whether ranks then still wait."""
    import deepspeed

    before = dist.all_reduce
    found: dict[str, Any] = {}
    with join_world() as world:
        # After the world, as `Engine` does: DeepSpeed keeps some functions of torch.distributed.
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        points, counts = world.wait_points, (2,) * world_size
        rows = torch.ones(2, 3, requires_grad=True)
        gathered = all_gather_rows(rows, world, counts)
        ring = RingExchange(world, counts).visit((rows.detach(),))
        actions = {
            "barrier": world.barrier,
            "objects": lambda: world.all_gather_objects([None, {"a": 1}]),
            "counts": lambda: world.all_gather_counts(3),
            "first": lambda: world.run_on_first(lambda: 3),
            "broadcast": lambda: world.broadcast_from_first([torch.ones(2)]),
            "numbers": lambda: world.all_gather_numbers([1.0, 2.0]),
            "gather": lambda: all_gather_rows(rows, world, counts),
            "scatter": lambda: gathered.sum().backward(),
            "sum": lambda: loss_collectives(world).sum(torch.ones(2)),
            "max": lambda: loss_collectives(world).max(torch.ones(2)),
            "ring": lambda: list(ring),
            "deepspeed": lambda: deepspeed.comm.all_reduce(torch.ones(2)),
            "deepspeed partition": lambda: deepspeed.comm.reduce_scatter_tensor(
                torch.ones(1), torch.ones(world_size)
            ),
        }
        for name, action in actions.items():
            start = sum(points.entered.values())
            action()
            found[name] = (sum(points.entered.values()) > start, points.waiting is None)
        work = dist.all_reduce(torch.ones(2), async_op=True)
        assert work is not None
        assert points.waiting is not None
        found["text"] = points.waiting.text()
        work.wait()
        points.synchronised()
        assert points.waiting is None
        members = {name: points.members[name] for name in points.entered}
    return found | {"members": members, "restored": dist.all_reduce is before}


def test_every_collective_is_counted() -> None:
    first, second = spawn(enter_collectives, 2)
    assert first == second
    assert first.pop("restored")
    assert first.pop("text").startswith("all_reduce, collective ")
    assert set(first.pop("members").values()) == {(0, 1)}
    assert first == dict.fromkeys(first, (True, True))


def test_call_on_a_device_is_waited_for_until_the_host_synchronises() -> None:
    def all_reduce(tensor: Tensor, group: Any = None, async_op: bool = False) -> None:
        pass

    points = WaitPoints()
    counted = points.counting("all_reduce", all_reduce, lambda group: [0, 1])
    counted(torch.ones(1, device="meta"))
    counted(torch.ones(1))  # a call on the host in between ends, and the device's is still open
    assert points.waiting is not None
    assert points.waiting.text() == "all_reduce, collective 1"
    assert points.entered == {"": 2}
    points.synchronised()
    counted(torch.ones(1))
    assert points.waiting is None
    outsider = points.counting("all_reduce", all_reduce, lambda group: [])
    outsider(torch.ones(1), type("Group", (), {"group_name": "other"}))
    assert points.entered == {"": 3}


# --------------------------------------------------------------- whole stalls

LIMIT = TrainConfig(steps=1, global_batch=1, micro_batch=1, timeout_s=8.0)
RECORD = {"entries": [], "version": "2.10", "pg_config": {}}


def hang_on_fake_gpus(rank: int, world_size: int, run_dir: Path, behind: int | None) -> None:
    """Enters collectives that return at once, as NCCL's do, and hangs as a read of a result does.

    The rank `behind` enters one collective fewer.
    """
    with join_world() as world:
        failures = FailureFile(run_dir / "failures" / "job.json", rank)
        on_gpu = replace(world, device=torch.device("cuda"))
        with running_watchdog(LIMIT, run_dir, on_gpu, failures) as watchdog:
            world.barrier()
            dist.destroy_process_group()
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
            record = pickle.dumps({**RECORD, "entries": [{"rank": rank}]})
            setattr(c10d, "_dump_nccl_trace", lambda: record)  # noqa: B010
            with FakeTensorMode():
                # The first calls import much, which takes seconds on a busy machine. The limit
                # counts from the end of the step: only the last call lies after it.
                for _ in range(2):
                    dist.all_reduce(torch.ones(2, device="cuda"))
                watchdog.step_finished(4, 0.1)
                if rank != behind:
                    dist.all_reduce(torch.ones(2, device="cuda"))
            threading.Event().wait(60)


def stall(run_dir: Path, behind: int | None) -> tuple[Mapping[str, Any], Path]:
    """The failure report of a job of three ranks that hangs, and its folder of stacks."""
    with started(hang_on_fake_gpus, 3, run_dir, behind, timeout_s=60.0) as (ranks, _):
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [3, 3, 3]
    return json.loads((run_dir / "failures" / "job.json").read_text()), run_dir / "stalls" / "job"


def test_rank_behind_is_blamed_although_collectives_return_at_once(tmp_path: Path) -> None:
    report, folder = stall(tmp_path, behind=1)
    assert report["of"] == 1
    assert f"rank 1 on {report['host']} is behind, in training after step 4 (" in report["error"]
    assert ", waiting since all_reduce, collective " in report["error"]
    assert report["error"].endswith(
        f"Stack traces of all threads and NCCL's flight recorder: {folder}"
    )
    for rank in range(3):
        assert "Thread" in (folder / f"rank-{rank:05d}.txt").read_text()
        dump = read_dump("nccl_trace_rank_", str(folder / f"nccl_trace_rank_{rank}"))
        assert dump["entries"] == [{"rank": rank}]


def test_ranks_equally_far_cost_no_node(tmp_path: Path) -> None:
    report, _ = stall(tmp_path, behind=None)
    assert report["of"] is None
    assert "no rank is behind the others, so none is named as the cause" in report["error"]


def test_flight_recorder_is_turned_on_unless_the_user_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in flight_recorder.BUFFER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    environment = flight_recorder.os.environ
    flight_recorder.enable_flight_recorder()
    assert environment.pop("TORCH_FR_BUFFER_SIZE") == "2000"
    environment.pop("TORCH_NCCL_TRACE_BUFFER_SIZE", None)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    flight_recorder.enable_flight_recorder()
    assert [environment.pop(name) for name in flight_recorder.BUFFER_VARIABLES] == ["2000"] * 2
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "0")
    flight_recorder.enable_flight_recorder()
    assert "TORCH_FR_BUFFER_SIZE" not in environment
    monkeypatch.setattr(c10d, "_dump_nccl_trace", lambda: b"record", raising=False)
    assert flight_recorder.flight_record() == b"record"
    monkeypatch.delattr(c10d, "_dump_nccl_trace")
    assert flight_recorder.flight_record() is None
