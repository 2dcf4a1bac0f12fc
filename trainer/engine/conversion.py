"""Converts a checkpoint into a universal one, in as many processes as there are cores.

The processes are forked, which is not safe in a rank: the threads of gloo and CUDA would be missing
in the copies, and locks that they hold would stay locked. So a process of its own converts:

    python -m tvr.trainer.engine.conversion < JOB

A small checkpoint is converted in the calling process, which takes less time than the start of
another one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from tvr.launchers.host_limits import host_cpus, host_memory
from tvr.launchers.process import end_with_parent
from tvr.trainer.engine.engine import write_universal
from tvr.trainer.engine.universal import UniversalTarget
from tvr.trainer.errors import TrainingFailed

# A process starts in about the time in which it converts this many bytes.
MIN_BYTES_PER_WORKER = 1 << 28
# Variables that would make the process a rank of the job, or let it use a GPU.
RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
OWN_VARIABLES = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def convert(shards: Path, folder: Path, zero_stage: int, target: UniversalTarget) -> None:
    """Converts a checkpoint; the files do not depend on the number of processes.

    Args:
        shards, folder, zero_stage, target: As of `engine.write_universal`.

    Raises:
        TrainingFailed: the process that converts failed; holds the end of its error output.
    """
    sizes = [file.stat().st_size for file in shards.iterdir()]
    workers = num_workers(sizes, host_cpus().usable, host_memory().available)
    if workers == 1:
        write_universal(shards, folder, zero_stage, target)
        return
    job = {
        "shards": str(shards),
        "folder": str(folder),
        "zero_stage": zero_stage,
        "target": {**asdict(target), "frozen": sorted(target.frozen)},
        "workers": workers,
        "rank_pid": os.getpid(),
    }
    environment = {name: v for name, v in os.environ.items() if name not in RANK_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-m", "tvr.trainer.engine.conversion"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment | OWN_VARIABLES,
    )
    if done.returncode != 0:
        raise TrainingFailed(
            f"{shards} cannot be converted for this job: {' '.join(done.stderr[-1000:].split())}"
        )


def num_workers(sizes: Sequence[int], cores: int, free: int) -> int:
    """Chooses the number of processes: at most one for each core.

    Args:
        sizes: Bytes of the checkpoint's files.
        cores: Cores that may be used.
        free: Bytes of free memory. A process holds one file, and copies of parts of it.
    """
    by_memory = free // (2 * max(sizes))
    return max(1, min(cores, sum(sizes) // MIN_BYTES_PER_WORKER, by_memory))


def main() -> None:
    """Does the job that standard input describes."""
    job = json.load(sys.stdin)
    end_with_parent(job["rank_pid"])
    target = job["target"]
    shapes = {name: torch.Size(shape) for name, shape in target["shapes"].items()}
    write_universal(
        Path(job["shards"]),
        Path(job["folder"]),
        job["zero_stage"],
        UniversalTarget(**{**target, "shapes": shapes, "frozen": frozenset(target["frozen"])}),
        workers=job["workers"],
    )


if __name__ == "__main__":
    main()
