"""Runs a test function on several ranks: processes on this machine, joined by gloo, no ports."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import ForkServer
from multiprocessing.popen_forkserver import Popen
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

# The fork server imports these once for all ranks, because that takes longer than most tests. The
# last ones are what a run imports only when it builds a tower or an engine.
PRELOADED = [
    "deepspeed",
    "tvr.trainer.cli",
    "tvr.trainer.loop",
    "tvr.trainer.model.towers",
    "transformers.models.clip.modeling_clip",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.utils.cpp_extension",
]
# A server of its own: `tvr pack` starts that of multiprocessing, which then preloads nothing else.
_SERVER = ForkServer()
_SERVER.set_forkserver_preload(PRELOADED)


class ForkedRank(ForkServerProcess):
    """A process that is forked from the server of the ranks."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Popen:
        with patch.object(forkserver, "connect_to_new_process", _SERVER.connect_to_new_process):
            return Popen(process_obj)


def spawn(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    anew: bool = False,
) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` on every rank of a gloo group; returns their values.

    Args:
        fn: Module-level function of a test module; arguments and values must be picklable.
        anew: Starts fresh processes with the present environment. Otherwise the ranks are forked
            from a server that has the environment of the first call.

    Raises:
        RuntimeError: a rank failed; holds its traceback.
        TimeoutError: a rank is still running after `timeout_s`.
    """
    with started(fn, world_size, *args, timeout_s=timeout_s, anew=anew) as (ranks, folder):
        _wait(ranks, folder, timeout_s)
        return [pickle.loads((folder / f"value-{rank}").read_bytes()) for rank in range(world_size)]


@contextmanager
def started(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    anew: bool = False,
) -> Iterator[tuple[list[BaseProcess], Path]]:
    """Starts ranks that run `fn`, and kills those that are left at the end of the block.

    Yields their processes, and the folder with their values and errors.
    """
    Process = multiprocessing.get_context("spawn").Process if anew else ForkedRank
    with tempfile.TemporaryDirectory(prefix="tvr-ranks-") as folder:
        job = pickle.dumps((fn, args))
        ranks: list[BaseProcess] = [
            Process(target=_run_rank, args=(rank, world_size, folder, job, timeout_s), daemon=False)
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            yield ranks, Path(folder)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()


def _wait(ranks: Sequence[BaseProcess], folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.exitcode is None for process in ranks):
        if any(process.exitcode for process in ranks):
            break
        if time.monotonic() > deadline:
            late = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
            raise TimeoutError(f"ranks {late} not done after {timeout_s} s")
        time.sleep(0.02)
    # A rank that lost its peer fails too; a short wait lets the first cause be written.
    for process in ranks:
        process.join(timeout=1.0 if any(other.exitcode for other in ranks) else None)
    if not any(process.exitcode for process in ranks):
        return
    causes = []
    for rank, process in enumerate(ranks):
        report = folder / f"error-{rank}"
        if report.exists():
            causes.append((report.stat().st_mtime_ns, f"rank {rank}:\n{report.read_text()}"))
        elif process.exitcode:
            causes.append((0, f"rank {rank} ended with exit code {process.exitcode}"))
    raise RuntimeError("\n".join(text for _, text in sorted(causes)))


def join_gloo(store: Path, rank: int, world_size: int, timeout_s: float) -> None:
    """Joins the ranks' gloo group through a file; `timeout_s` is that of its collectives, too."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def _run_rank(rank: int, world_size: int, folder: str, job: bytes, timeout_s: float) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        # DeepSpeed requires an address even if the group exists; nothing listens there.
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR=os.environ.get("DS_ACCELERATOR", "cpu"),
        # Otherwise gloo resolves the host's name, which fails on some machines.
        GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    )
    # The imported modules hold a million objects. A collection would copy all their pages, which
    # the rank shares with the fork server.
    gc.freeze()
    import torch
    import torch.distributed as dist

    from tvr.launchers.rank_main import end_process

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        join_gloo(Path(folder) / "store", rank, world_size, timeout_s)
        fn, args = pickle.loads(job)
        value = fn(rank, world_size, *args)
        (Path(folder) / f"value-{rank}").write_bytes(pickle.dumps(value))
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves first would break the others' last collective
            dist.destroy_process_group()
        end_process(0)
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        sys.exit(1)
