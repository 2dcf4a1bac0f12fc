"""Loader workers ignore the SIGTERM of batch systems, and collect their own garbage."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess

import torch
from builders.spawn import spawn
from torch.utils.data import DataLoader

from tvr.data_prep.reading.worker_process import start_worker


def numbers(workers: int) -> DataLoader:
    return DataLoader(
        range(200),  # type: ignore[arg-type]
        num_workers=workers,
        worker_init_fn=start_worker,
        multiprocessing_context="fork",
    )


def signalled_on_rank(rank: int, world_size: int) -> None:
    batches = iter(numbers(2))
    received = [next(batches) for _ in range(20)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        # From another process, like the daemon of a batch system.
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    received += batches
    assert torch.cat(received).tolist() == list(range(200))
    batches = iter(numbers(1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(30)
    assert worker.exitcode == 0


def test_a_worker_exits_on_sigterm_only_from_its_rank() -> None:
    # In a process of its own, as in training: what other tests left in this one, threads and
    # workers of loaders, would receive the signal, too.
    spawn(signalled_on_rank, 1)


def is_collecting(values: list[int]) -> bool:
    return gc.isenabled()


def test_a_worker_collects_garbage_although_its_rank_does_so_on_a_schedule() -> None:
    gc.disable()
    try:
        loader = DataLoader(
            range(4),  # type: ignore[arg-type]
            num_workers=1,
            collate_fn=is_collecting,
            worker_init_fn=start_worker,
            multiprocessing_context="fork",
        )
        assert all(loader)
    finally:
        gc.enable()
