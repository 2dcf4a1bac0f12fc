"""Finds the newest checkpoint whose files are intact.

Every file's size and sha256 are compared with the manifest before anything is unpickled. A damaged
checkpoint is reported with the files at fault, and the checkpoint before it is used.

The ranks share the files: one rank reads each of them, once. Files of a remote checkpoint are
copied to a local disk by the same read.
"""

from __future__ import annotations

import heapq
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.catalogue import (
    Checkpoint,
    checkpoint_name,
    list_candidates,
    lost_manifest,
    raise_if_unreadable,
    read_latest,
    read_state,
)
from tvr.trainer.checkpoint.manifest import SavedState, find_damage
from tvr.trainer.distributed.world import World
from tvr.trainer.errors import CheckpointDamaged

# The rank in a file's name, as DeepSpeed and `random_state_file` write it.
RANK_IN_NAME = re.compile(r"(?:zero_pp_rank_|random-rank-)(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointScan:
    """The newest intact checkpoint, and the damaged ones that are newer."""

    newest: Checkpoint | None
    damaged: dict[int, tuple[str, ...]]
    """Lines that describe the errors, by step."""


def find_newest_intact(
    storage: StorageFolder,
    world: World,
    *,
    is_needed: Callable[[SavedState, str], bool] | None = None,
    copies: Path | None = None,
    only: int | None = None,
) -> CheckpointScan:
    """Finds the newest checkpoint whose files are as written, byte by byte.

    The ranks share the reading; all of them call it and get the same result.

    Args:
        is_needed: True for the files that the caller will load, by name in the manifest; damage to
            other files does not count. None: all files.
        copies: Folder to which this rank copies the files of its share, at `copies`/CHECKPOINT, if
            the storage is remote; `restore.local_files` finds them there. Ranks may pass the same
            folder, or none.
        only: The one step that counts; None: any.

    Raises:
        CheckpointDamaged: there are checkpoints, and all that count are damaged.
        PreflightFailed: a checkpoint cannot be read at the moment, so its state is unknown.
    """
    damaged: dict[int, tuple[str, ...]] = {}
    steps, latest = world.run_on_first(lambda: (list_candidates(storage), read_latest(storage)))
    for step in reversed(steps if only is None else [only]):
        name = checkpoint_name(step)
        state, lines = world.run_on_first(lambda step=step: read_state(storage, step))
        if state is not None:
            needed = [file for file in state.files if is_needed is None or is_needed(state, file)]
            own_files = split_files(state, needed, world.world_size)[world.rank]
            folder = None if storage.is_local or copies is None else copies / name
            results = world.all_gather_objects(_verify(storage, name, state, own_files, folder))
            raise_if_unreadable(storage, name, [error for _, error in results])
            lines = [*lines, *(line for part, _ in results for line in part)]
            if not lines:
                return CheckpointScan(newest=Checkpoint(name=name, state=state), damaged=damaged)
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        elif not lines and step == latest:
            lines = [lost_manifest(storage, step)]
        if lines:  # otherwise the files of an unfinished save, or those of a removed checkpoint
            damaged[step] = tuple(lines)
    if damaged:
        text = "; ".join(line for lines in damaged.values() for line in lines)
        if only is not None:
            raise CheckpointDamaged(f"{storage.url}: the checkpoint of step {only}: {text}")
        raise CheckpointDamaged(
            f"{storage.url}: all checkpoints are damaged: {text}. Restore one of them, or train in"
            " another folder"
        )
    return CheckpointScan(newest=None, damaged={})


def split_files(state: SavedState, names: Iterable[str], world_size: int) -> list[list[str]]:
    """Splits files of a checkpoint over ranks, so that each rank has about as many bytes.

    A rank gets the files that it will load if as many ranks saved the checkpoint: the disk's cache
    then holds them. No rank has more bytes than its own files, or an equal share, and one file.

    Returns:
        Names of the files of each rank.
    """
    shares: list[list[str]] = [[] for _ in range(world_size)]
    others = []
    for name in names:
        match = RANK_IN_NAME.search(name)
        if match and state.world_size == world_size and int(match[1]) < world_size:
            shares[int(match[1])].append(name)
        else:
            others.append(name)
    loads = [
        (sum(state.files[name].num_bytes for name in own), rank) for rank, own in enumerate(shares)
    ]
    heapq.heapify(loads)
    for name in sorted(others, key=lambda name: (-state.files[name].num_bytes, name)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(name)
        heapq.heappush(loads, (load + state.files[name].num_bytes, rank))
    return shares


def _verify(
    storage: StorageFolder,
    name: str,
    state: SavedState,
    files: Iterable[str],
    folder: Path | None,
) -> tuple[list[str], str | None]:
    """A line for each damaged file, or the error that prevents reading."""
    copies = None if folder is None else StorageFolder(str(folder))
    try:
        return find_damage(storage, name, state, files, copies), None
    except OSError as error:
        return [], f"{type(error).__name__}: {error}"
