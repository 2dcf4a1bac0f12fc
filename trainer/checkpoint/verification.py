"""Finds the newest checkpoint whose files are intact.

Every file's size and sha256 are compared with the manifest before anything is unpickled. A damaged
checkpoint is reported with the files at fault, and the checkpoint before it is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.catalogue import (
    Checkpoint,
    checkpoint_name,
    list_steps,
    raise_if_unreadable,
    read_state,
)
from tvr.trainer.checkpoint.manifest import SavedState, find_damage
from tvr.trainer.distributed.world import World
from tvr.trainer.errors import CheckpointDamaged


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointScan:
    """The newest intact checkpoint, and the damaged ones that are newer."""

    newest: Checkpoint | None
    damaged: dict[str, tuple[str, ...]]
    """Lines that describe the errors, by name of the checkpoint."""


def find_newest_intact(storage: StorageFolder, world: World) -> CheckpointScan:
    """Finds the newest checkpoint whose every byte is as written.

    The ranks share the reading; all of them call it and get the same result.

    Raises:
        CheckpointDamaged: there are checkpoints, and all are damaged.
        PreflightFailed: a checkpoint cannot be read at the moment, so its state is unknown.
    """
    damaged: dict[str, tuple[str, ...]] = {}
    for step in reversed(world.run_on_first(lambda: list_steps(storage))):
        name = checkpoint_name(step)
        state, lines = world.run_on_first(lambda name=name: read_state(storage, name))
        if state is not None:
            own_files = sorted(state.files)[world.rank :: world.world_size]
            results = world.all_gather_objects(_verify(storage, name, state, own_files))
            raise_if_unreadable(storage, name, [error for _, error in results])
            lines += [line for part, _ in results for line in part]
            if not lines:
                return CheckpointScan(newest=Checkpoint(name=name, state=state), damaged=damaged)
        damaged[name] = tuple(lines)
    if damaged:
        text = "; ".join(line for lines in damaged.values() for line in lines)
        raise CheckpointDamaged(
            f"{storage.url}: all checkpoints are damaged: {text}. Restore one of them, or train in"
            " another folder"
        )
    return CheckpointScan(newest=None, damaged={})


def rename_damaged(storage: StorageFolder, scan: CheckpointScan) -> None:
    """Gives each damaged checkpoint the prefix `damaged-`.

    It no longer counts as a checkpoint, and its files stay for inspection.
    """
    for name in scan.damaged:
        storage.remove(f"damaged-{name}")
        storage.rename(name, f"damaged-{name}")


def _verify(
    storage: StorageFolder, name: str, state: SavedState, files: Iterable[str]
) -> tuple[list[str], str | None]:
    """A line for each damaged file, or the error that prevents reading."""
    try:
        return find_damage(storage, name, state, files), None
    except OSError as error:
        return [], f"{type(error).__name__}: {error}"
