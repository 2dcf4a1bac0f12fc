"""Puts a checkpoint back into a model under ZeRO, on as many ranks as there are now."""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tvr.trainer.checkpoint.catalogue import SHARDS, Checkpoint, newest_whole, set_aside
from tvr.trainer.checkpoint.manifest import SavedState, damage
from tvr.trainer.checkpoint.place import Place
from tvr.trainer.config import TrainConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.engine import Engine, universal_target, write_universal
from tvr.trainer.engine.random_state import random_state_file, set_random_state
from tvr.trainer.engine.universal import load_frozen_weights
from tvr.trainer.errors import CheckpointDamaged
from tvr.trainer.model.model import TextVideoModel
from tvr.trainer.monitoring.run_log import LogWriter

SCRATCH = ".resume"

Resume = Literal["auto", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A checkpoint as local files that this job's engine can load."""

    folder: Path
    universal: bool
    random: Path | None
    """This rank's random states; none where it is another number of ranks."""


def resume_point(place: Place, log: LogWriter, world: World, resume: Resume) -> Checkpoint | None:
    """The newest whole checkpoint; damaged ones are told and set aside. All ranks call it.

    Raises:
        CheckpointDamaged: there are checkpoints, and none is whole.
        ValueError: there is one, and `resume` is "never".
    """
    found = newest_whole(place, world)
    for name, lines in found.damaged.items():
        log.write("checkpoint_damaged", {"name": name, "errors": lines})
        log.warn(f"{name} is damaged and not used: {'; '.join(lines)}")
    world.run_on_first(lambda: set_aside(place, found))
    if found.newest is not None and resume == "never":
        raise ValueError(
            f"{place.url} holds {found.newest.name} and --resume is never: continue with --resume"
            " auto, or train in another folder"
        )
    return found.newest


def engine_from(
    checkpoint: Checkpoint | None,
    place: Place,
    model: TextVideoModel,
    train: TrainConfig,
    run_dir: Path,
    world: World,
) -> Engine:
    """The model under ZeRO, at its start or as the checkpoint left it, and the random states."""
    if checkpoint is None:
        engine = Engine(model, train, world)
        # Equal weights on all ranks, but dropout of each rank's own.
        torch.manual_seed(train.seed + 1 + world.rank)
        return engine
    with _prepared(place, checkpoint, model, train, run_dir, world) as files:
        if files.universal:
            load_frozen_weights(model, files.folder)
        engine = Engine(model, train, world, universal=files.universal)
        engine.load_checkpoint(files.folder)
        if files.random is not None:
            set_random_state(torch.load(files.random, weights_only=True))
        else:
            # The old ranks' streams belong to nobody now: each new rank begins one of its own.
            torch.manual_seed(_seed(train.seed, checkpoint.state.step, world.rank))
    return engine


@contextmanager
def _prepared(
    place: Place,
    checkpoint: Checkpoint,
    model: TextVideoModel,
    train: TrainConfig,
    run_dir: Path,
    world: World,
) -> Iterator[_Prepared]:
    """Fetches a remote checkpoint, and converts one of another number of ranks, ZeRO stage or
    precision, in a folder of `run_dir` that is gone afterwards. All ranks call it."""
    state, scratch = checkpoint.state, run_dir / SCRATCH
    same = is_same_layout(state, train, world.world_size)

    def prepare() -> Path:
        shutil.rmtree(scratch, ignore_errors=True)
        source = local_files(place, checkpoint, scratch / "fetched")
        if not same:
            reader = universal_target(model, train, world.world_size)
            write_universal(source / SHARDS, scratch / "universal", state.zero_stage, reader)
        return source

    source = world.run_on_first(prepare)
    try:
        yield _Prepared(
            folder=source / SHARDS if same else scratch / "universal",
            universal=not same,
            random=source / random_state_file(world.rank) if same else None,
        )
        world.barrier()
    finally:
        if world.is_first:
            shutil.rmtree(scratch, ignore_errors=True)


def is_same_layout(state: SavedState, train: TrainConfig, world_size: int) -> bool:
    """Whether each rank finds its own files in the checkpoint."""
    now = (world_size, train.zero_stage, train.precision)
    return now == (state.world_size, state.zero_stage, state.precision)


def local_files(place: Place, checkpoint: Checkpoint, folder: Path) -> Path:
    """The folder of a checkpoint's files on a local disk: its own, or a verified copy.

    Raises:
        CheckpointDamaged: the copy is not what was written.
    """
    if place.is_local:
        return Path(place.path(checkpoint.name))
    copy = Place(str(folder))
    for name in checkpoint.state.files:
        with place.reading(f"{checkpoint.name}/{name}") as source, copy.writing(name) as target:
            shutil.copyfileobj(source, target, 1 << 22)
    if wrong := damage(copy, ".", checkpoint.state, checkpoint.state.files):
        raise CheckpointDamaged(f"fetched from {place.url}: {'; '.join(wrong)}")
    return folder


def _seed(*numbers: int) -> int:
    words = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(words, digest_size=7).digest(), "little")
