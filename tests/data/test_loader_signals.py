"""Loader processes and the SIGTERM that batch systems send to all processes of a job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess

import torch
from torch.utils.data import DataLoader

from tvr.data_prep.reading.loader import _exit_on_sigterm_of_parent


def numbers(workers: int) -> DataLoader:
    return DataLoader(
        range(200),  # type: ignore[arg-type]
        num_workers=workers,
        worker_init_fn=_exit_on_sigterm_of_parent,
        multiprocessing_context="fork",
    )


def test_a_loader_stays_when_others_send_sigterm_and_leaves_by_its_ranks() -> None:
    batches = iter(numbers(2))
    got = [next(batches) for _ in range(20)]
    loaders = multiprocessing.active_children()
    for loader in loaders:
        # From another process, as a batch system's daemon does.
        subprocess.run(["kill", "-TERM", str(loader.pid)], check=True)
    got += batches
    assert torch.cat(got).tolist() == list(range(200))
    batches = iter(numbers(1))
    next(batches)
    (loader,) = multiprocessing.active_children()
    assert loader.pid is not None
    os.kill(loader.pid, signal.SIGTERM)
    loader.join(30)
    assert loader.exitcode == 0
