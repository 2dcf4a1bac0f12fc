"""Builds the parts that the steps of a run need, for training and for the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch

from tvr.data_prep.records import Batch
from tvr.trainer.checkpoint.catalogue import Checkpoint
from tvr.trainer.checkpoint.manifest import SavedState
from tvr.trainer.checkpoint.restore import restore_engine
from tvr.trainer.checkpoint.saver import rank_files
from tvr.trainer.config import Config, ModelConfig, to_json
from tvr.trainer.data import StoredTowers, training_batches, training_mixture
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.deepspeed_config import state_layout
from tvr.trainer.engine.engine import Engine
from tvr.trainer.engine.random_state import get_random_state
from tvr.trainer.evaluation.warm_start import WarmStart
from tvr.trainer.fencing import Attempt
from tvr.trainer.frozen.tower_outputs import Report, open_or_make
from tvr.trainer.hard_batches.hard_epochs import HardEpochs
from tvr.trainer.hard_batches.sentence_vectors import caption_encoder
from tvr.trainer.model.model import TextVideoModel, build_empty_model, build_model
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.monitoring.run_log import LogWriter
from tvr.trainer.monitoring.stopwatch import Stopwatch
from tvr.trainer.run_dir import checkpoints_of
from tvr.trainer.train_step import TrainStep


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """A run that is ready for its next step: data, model, engine and the optimiser step."""

    config: Config
    world: World
    attempt: Attempt
    log: LogWriter
    tokenizer: Tokenizer
    engine: Engine
    train_step: TrainStep
    resumed_from: SavedState | None
    """The checkpoint that was loaded; none at the start of a run."""
    stored: StoredTowers | None = None
    """Stored outputs of the frozen towers, with `data.features`."""
    contents: Mapping[str, str]
    """Digests of data sets and model folders, which checkpoints record."""
    hard_epochs: HardEpochs | None = None
    """Caption vectors of `data.hard_batches`; none if it is off."""

    @property
    def start_step(self) -> int:
        """Optimiser steps that are already done."""
        return self.resumed_from.step if self.resumed_from else 0

    def batches(self, done: int | None = None) -> Iterator[Batch]:
        """This rank's micro-batches of the steps that are left.

        Args:
            done: Steps that are done; None = `start_step`.

        Raises:
            ValueError, OSError, TooManyBadSamples: as `training_batches`.
        """
        config = self.config
        return training_batches(
            config.data,
            config.model,
            config.train,
            self.tokenizer,
            self.world,
            start_step=self.start_step if done is None else done,
            known_bad=dict(self.train_step.quarantine),
            stored=self.stored,
            regroup=self.hard_epochs.regroup() if self.hard_epochs else {},
        )

    def find_hard_batches(self, done: int) -> None:
        """Finds the caption vectors that `hard_epochs` needs after `done` steps."""
        assert self.hard_epochs is not None
        if self.world.is_first:
            self.attempt.check()
        self.engine.set_training(False)
        encode = caption_encoder(self.engine, self.config, self.tokenizer, self.world)
        self.hard_epochs.find(done, encode)
        self.engine.set_training(True)

    def state_dict(self, copy: bool) -> dict[str, Any]:
        """This rank's files of a checkpoint by name: weights, optimiser and random states.

        Args:
            copy: Copies the tensors to host memory; otherwise they change with the next step.
        """
        shards = self.engine.state_dict(copy=copy)
        return rank_files(shards, self.world.rank, get_random_state())

    def saved_state(self, step: int) -> SavedState:
        """The record of a checkpoint after `step`; the saver fills in its files."""
        return SavedState(
            step=step,
            world_size=self.world.world_size,
            zero_stage=self.config.train.zero_stage,
            precision=state_layout(self.config.train),
            attempt=self.attempt.number,
            quarantine=dict(self.train_step.quarantine),
            metrics=dict(self.train_step.saved_counters),
            settings=json.loads(to_json(self.config)),
            contents=dict(self.contents),
            files={},
        )


def build_run(
    config: Config,
    run_dir: Path,
    world: World,
    *,
    attempt: Attempt,
    log: LogWriter,
    tokenizer: Tokenizer,
    num_samples: Mapping[str, int],
    contents: Mapping[str, str] = MappingProxyType({}),
    checkpoint: Checkpoint | None = None,
    inspect_model: Callable[[TextVideoModel], None] | None = None,
    watch: Stopwatch | None = None,
    report: Report | None = None,
) -> TrainingRun:
    """Builds the model, puts it under ZeRO, and loads a checkpoint into it. All ranks call it.

    Args:
        run_dir: Folder of the run. A checkpoint of another layout is converted in it.
        num_samples: Samples of each training set, as `DataSets` has them.
        contents: Digests of data sets and model folders, as `Claim` has them.
        checkpoint: Checkpoint of this run to resume from; none starts at step 0.
        inspect_model: Called with the whole model, before ZeRO partitions it.
        watch: Measures the parts of each step.
        report: As in `open_or_make`.

    Raises:
        ValueError: settings, or a model folder, that cannot be used; or the weights of
            `model.init_from` do not fit.
        CheckpointDamaged: a fetched checkpoint differs from what was written.
    """
    hard_epochs = None
    if config.data.hard_batches:
        hard_epochs = HardEpochs(config, run_dir, checkpoint.state.step if checkpoint else 0, world)
    model = initial_model(config, tokenizer, world, warm=checkpoint is None)
    if inspect_model is not None:
        inspect_model(model)
    storage = checkpoints_of(config.checkpoint, run_dir)
    engine = restore_engine(checkpoint, storage, model, config.train, run_dir, world)
    stored = open_or_make(config, cast(TextVideoModel, engine.module), tokenizer, world, report)
    train_step = TrainStep(
        config,
        engine,
        log,
        world,
        num_samples,
        training_mixture(config.data, config.train),
        watch=watch or Stopwatch(),
    )
    resumed_from = checkpoint.state if checkpoint else None
    if resumed_from is not None:
        train_step.load_counters(resumed_from)
    return TrainingRun(
        config=config,
        world=world,
        attempt=attempt,
        log=log,
        tokenizer=tokenizer,
        engine=engine,
        train_step=train_step,
        resumed_from=resumed_from,
        stored=stored,
        contents=contents,
        hard_epochs=hard_epochs,
    )


def initial_model(
    config: Config, tokenizer: Tokenizer, world: World, *, warm: bool = True
) -> TextVideoModel:
    """Builds the model of a run before its first step; only rank 0's weights count.

    All ranks call it, and it sets torch's seed.

    Args:
        warm: Reads the weights of `model.init_from`.

    Raises:
        ValueError: settings, or a model folder, that cannot be used; or the weights of
            `model.init_from` do not fit.
    """
    # Before the seed is set: parts that are not read start as in any other run.
    warm = warm and config.model.init_from is not None
    start = _read_warm_start(config.model, tokenizer, world) if warm else None
    torch.manual_seed(config.train.seed)
    # At ZeRO-3 rank 0 distributes the weights, and the other ranks never hold all of them.
    is_empty = config.train.zero_stage == 3 and not world.is_first
    build = build_empty_model if is_empty else build_model
    if start is not None:
        build = partial(build_model, initialise=start.apply)
    return world.run_on_all(
        lambda: build(config.model, config.loss, tokenizer, num_frames=config.data.num_frames),
        ValueError,
    )


def _read_warm_start(model: ModelConfig, tokenizer: Tokenizer, world: World) -> WarmStart | None:
    """Reads the weights of `model.init_from` on rank 0; None on other ranks. All ranks call it.

    At every ZeRO stage the engine gives all ranks rank 0's weights.
    """
    read: list[WarmStart] = []
    world.run_on_first(lambda: read.append(WarmStart(model, tokenizer)), patient=True)
    return read[0] if read else None
