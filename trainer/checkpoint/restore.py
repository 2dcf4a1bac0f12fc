"""Restores a checkpoint into a model under ZeRO, on any number of ranks."""

from __future__ import annotations

import hashlib
import logging
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.catalogue import SHARDS, Checkpoint, checkpoint_name
from tvr.trainer.checkpoint.choice import CheckpointChoice, chosen_step
from tvr.trainer.checkpoint.manifest import SavedState, find_damage
from tvr.trainer.checkpoint.saver import Saver
from tvr.trainer.checkpoint.verification import find_newest_intact
from tvr.trainer.config import TrainConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.conversion import convert
from tvr.trainer.engine.deepspeed_config import state_layout
from tvr.trainer.engine.engine import Engine, consolidated_weights, universal_target
from tvr.trainer.engine.random_state import random_state_file, set_random_state
from tvr.trainer.engine.universal import holds_weights, load_frozen_weights
from tvr.trainer.errors import CheckpointDamaged
from tvr.trainer.model.model import TextVideoModel
from tvr.trainer.model.parameter_groups import has_same_groups
from tvr.trainer.monitoring.run_log import LogWriter

SCRATCH = ".resume"
FETCHED, UNIVERSAL = "fetched", "universal"

Resume = Literal["auto", "never"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _LoadableFiles:
    """A checkpoint as local files that this job's engine can load."""

    folder: Path
    universal: bool
    random: Path | None
    """This rank's random states; None if the number of ranks has changed."""


def find_resume_checkpoint(
    saver: Saver, log: LogWriter, world: World, resume: Resume, run_dir: Path
) -> Checkpoint | None:
    """The newest intact checkpoint; damaged ones are logged and set aside. All ranks call it.

    The ranks copy a remote checkpoint to a temporary folder of `run_dir` while they verify it, for
    `restore_engine`.

    Raises:
        CheckpointDamaged: there are checkpoints, and all are damaged.
        ValueError: there is a checkpoint, and `resume` is "never".
    """
    scratch = run_dir / SCRATCH
    world.run_on_first(lambda: shutil.rmtree(scratch, ignore_errors=True))
    copies = None if resume == "never" else scratch / FETCHED
    storage = saver.storage
    scan = find_newest_intact(storage, world, copies=copies)
    for step, lines in scan.damaged.items():
        name = checkpoint_name(step)
        log.write("checkpoint_damaged", {"name": name, "errors": lines})
        log.warn(f"{name} is damaged and not used: {'; '.join(lines)}")
    saver.set_aside_damaged(scan)
    if scan.newest is not None and resume == "never":
        raise ValueError(
            f"{storage.url} holds {scan.newest.name} and --resume is never: continue with --resume"
            " auto, or train in another folder"
        )
    return scan.newest


def restore_engine(
    checkpoint: Checkpoint | None,
    storage: StorageFolder,
    model: TextVideoModel,
    train: TrainConfig,
    run_dir: Path,
    world: World,
) -> Engine:
    """Creates the engine and restores a checkpoint's state, random states included.

    Args:
        checkpoint: None: the model keeps its initial weights.
    """
    if checkpoint is None:
        engine = Engine(model, train, world)
        # All ranks hold equal weights, but each draws its own dropout.
        torch.manual_seed(train.seed + 1 + world.rank)
        return engine
    with _loadable_files(storage, checkpoint, model, train, run_dir, world) as files:
        if files.universal and (train.zero_stage < 3 or world.is_first):
            load_frozen_weights(model, files.folder)
        engine = Engine(model, train, world, universal=files.universal)
        engine.load_checkpoint(files.folder)
        if files.random is not None:
            set_random_state(torch.load(files.random, weights_only=True))
        else:
            # The saved streams belong to ranks that no longer exist: each new rank starts its own.
            torch.manual_seed(_seed(train.seed, checkpoint.state.step, world.rank))
    return engine


@contextmanager
def _loadable_files(
    storage: StorageFolder,
    checkpoint: Checkpoint,
    model: TextVideoModel,
    train: TrainConfig,
    run_dir: Path,
    world: World,
) -> Iterator[_LoadableFiles]:
    """Fetches and converts a checkpoint to a temporary folder of `run_dir`, as far as needed.

    A remote checkpoint is fetched, unless `find_resume_checkpoint` has copied it. One with another
    number of ranks, ZeRO stage, precision or grouping of the parameters is converted to the
    universal form, while the other ranks wait without a time-out. All ranks call it.
    """
    state, scratch = checkpoint.state, run_dir / SCRATCH
    saved = _saved_rates(state, train)
    same = is_same_layout(state, train, world.world_size) and has_same_groups(model, train, saved)

    def prepare() -> Path:
        source = local_files(storage, checkpoint, scratch / FETCHED / checkpoint.name)
        if not same:
            shutil.rmtree(scratch / UNIVERSAL, ignore_errors=True)
            reader = universal_target(model, train, world.world_size, saved)
            convert(source / SHARDS, scratch / UNIVERSAL, state.zero_stage, reader)
        return source

    source = world.run_on_first(prepare, patient=not (same and storage.is_local))
    try:
        yield _LoadableFiles(
            folder=source / SHARDS if same else scratch / UNIVERSAL,
            universal=not same,
            random=source / random_state_file(world.rank) if same else None,
        )
        world.barrier()
    finally:
        if world.is_first:
            shutil.rmtree(scratch, ignore_errors=True)


def _saved_rates(state: SavedState, train: TrainConfig) -> TrainConfig:
    """These settings with the learning rates of the checkpoint, by which parameters are grouped."""
    saved = state.settings.get("train", {})
    names = ("learning_rate", "encoder_learning_rate", "layer_decay")
    return replace(train, **{name: saved[name] for name in names if name in saved})


def is_same_layout(state: SavedState, train: TrainConfig, world_size: int) -> bool:
    """True if each rank can load its own files of the checkpoint without conversion."""
    current = (world_size, train.zero_stage, state_layout(train))
    return current == (state.world_size, state.zero_stage, state.precision)


def find_newest_weights(
    storage: StorageFolder, world: World, folder: Path, choice: CheckpointChoice = "newest"
) -> Checkpoint | None:
    """The newest checkpoint whose weights are intact, whatever its other files. All ranks call it.

    Only the files that `load_weights` reads are verified (`engine.universal.holds_weights`).

    Args:
        folder: Empty folder, in which rank 0 keeps what it fetches for `load_weights`.
        choice: Another checkpoint than the newest; no other one takes its place.

    Raises:
        ValueError: the chosen one is not there; names the steps there are.
        CheckpointDamaged: there are checkpoints, and the weights of all, or of the chosen one, are
            damaged.
    """
    copies = folder if world.is_first else None
    only = world.run_on_first(lambda: chosen_step(storage, choice))
    scan = find_newest_intact(storage, world, is_needed=_has_weights, copies=copies, only=only)
    for step, lines in scan.damaged.items():
        if world.is_first:
            log.warning("%s is damaged: %s", checkpoint_name(step), "; ".join(lines))
    return scan.newest


def load_weights(
    storage: StorageFolder,
    checkpoint: Checkpoint,
    model: TextVideoModel,
    folder: Path,
    world: World,
) -> None:
    """Loads the weights of a checkpoint into a whole model. All ranks call it.

    Rank 0 alone reads them, for all ranks.

    Args:
        checkpoint, folder: Of `find_newest_weights`.
    """

    def read() -> None:
        model.load_state_dict(read_weights(storage, checkpoint, folder))

    world.run_on_first(read, patient=True)
    world.broadcast_from_first(model.state_dict().values())


def read_weights(
    storage: StorageFolder, checkpoint: Checkpoint, folder: Path
) -> dict[str, torch.Tensor]:
    """The whole fp32 weights of a checkpoint, by name, in this process alone.

    Args:
        checkpoint, folder: Of `find_newest_weights`.
    """
    state = checkpoint.state
    names = [name for name in state.files if _has_weights(state, name)]
    source = local_files(storage, checkpoint, folder / checkpoint.name, names)
    return consolidated_weights(source / SHARDS, state.zero_stage)


def local_files(
    storage: StorageFolder, checkpoint: Checkpoint, folder: Path, names: Iterable[str] | None = None
) -> Path:
    """A local folder with a checkpoint's files: its own, or verified copies in `folder`.

    Its `shards` hold the files that the manifest lists and no others, as DeepSpeed's loader needs.
    Files that `folder` holds already are not fetched again.

    Args:
        names: Files to fetch; None: all.

    Raises:
        CheckpointDamaged: a file differs from the checkpoint's manifest.
    """
    if storage.is_local:
        return Path(storage.path(checkpoint.folder))
    wanted = checkpoint.state.files if names is None else names
    missing = [name for name in wanted if not (folder / name).exists()]
    copies = StorageFolder(str(folder))
    if wrong := find_damage(storage, checkpoint.name, checkpoint.state, missing, copies):
        raise CheckpointDamaged(f"fetched from {storage.url}: {'; '.join(wrong)}")
    return folder


def _has_weights(state: SavedState, name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return folder == SHARDS and holds_weights(file, state.zero_stage, state.precision)


def _seed(*numbers: int) -> int:
    """A 56-bit seed that depends on all the numbers."""
    words = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(words, digest_size=7).digest(), "little")
