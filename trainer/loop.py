"""The training loop: batch, features, loss of the global batch, step; evaluate, save, log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvr.data_prep.manifest import read_manifest
from tvr.data_prep.records import Batch
from tvr.data_prep.stream import train_batches
from tvr.trainer.checkpoint import (
    SavedState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from tvr.trainer.config import Config, accumulation_steps
from tvr.trainer.engine import Engine
from tvr.trainer.errors import NonFiniteLoss
from tvr.trainer.evaluate import Evaluation, evaluate
from tvr.trainer.gather import gather_rows
from tvr.trainer.model import build_model, image_size, model_inputs, tokenizer_folder
from tvr.trainer.objective import SHARES, objective
from tvr.trainer.progress import Progress
from tvr.trainer.run_dir import CHECKPOINTS, claim, write_evaluation
from tvr.trainer.run_log import LogWriter
from tvr.trainer.schedule import learning_rate_factor
from tvr.trainer.tokenizer import Tokenizer, load_tokenizer
from tvr.trainer.world import World, join_world


def train(config: Config, run_dir: Path) -> Evaluation | None:
    """Trains to `train.steps`, continuing from the newest checkpoint in `run_dir`.

    Every rank of the job calls it. Returns the last evaluation (none without a test set).

    Raises:
        ValueError: settings, data or a `run_dir` of another configuration that cannot be used.
        CheckpointIncompatible: a checkpoint of another number of ranks or ZeRO stage.
        NonFiniteLoss: naming step, rank and keys.
        TooManyBadSamples: the budget `data.max_bad` is spent.
    """
    with join_world() as world:
        claim(run_dir, config, world)
        # Read here too, so that a missing data set is said before the towers are built.
        num_samples = read_manifest(config.data.train).num_samples
        tokenizer = load_tokenizer(tokenizer_folder(config.model), config.data.max_words)
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)
        engine = Engine(model, config.train, world)
        # Equal weights on all ranks, but dropout of each rank's own.
        torch.manual_seed(config.train.seed + 1 + world.rank)
        log = LogWriter(run_dir, world.rank)
        return _Run(config, run_dir, log, engine, tokenizer, world, num_samples).to_the_end()


@dataclass(frozen=True, slots=True)
class _Run:
    config: Config
    run_dir: Path
    log: LogWriter
    engine: Engine
    tokenizer: Tokenizer
    world: World
    num_samples: int

    def to_the_end(self) -> Evaluation | None:
        train, evaluation = self.config.train, None
        start_step = self._resume()
        batches = self._batches(start_step)
        with Progress(train.steps, start_step, enabled=self.world.is_first) as progress:
            for step in range(start_step, train.steps):
                record = self._step(step, batches)
                done = step + 1
                if done % train.log_every == 0 or done == train.steps:
                    self.log.write("step", record)
                progress.step(done, record)
                if _due(done, train.eval_every, train.steps) and self.config.data.test:
                    evaluation = self._evaluate(done)
                    progress.show(evaluation.table())
                if _due(done, train.save_every, train.steps):
                    self._save(done)
        return evaluation

    def _step(self, step: int, batches: Iterator[Batch]) -> dict[str, Any]:
        """One optimiser step; returns the values of its global batch, averaged over micro-steps."""
        train, world = self.config.train, self.world
        started, waited_s, norm = time.perf_counter(), 0.0, None
        factor = learning_rate_factor(step, warmup_steps=train.warmup_steps, steps=train.steps)
        micro_steps = accumulation_steps(train, world.world_size)
        totals = torch.zeros(len(SHARES))
        for _ in range(micro_steps):
            before = time.perf_counter()
            batch = next(batches)
            waited_s += time.perf_counter() - before
            shares, norm = self._micro_step(batch, step + 1, factor)
            totals += shares / micro_steps
        seconds = time.perf_counter() - started
        return {
            "step": step + 1,
            "epoch": (step + 1) * train.global_batch / self.num_samples,
            **dict(zip(SHARES, totals.tolist(), strict=True)),
            "learning_rate": train.learning_rate * factor,
            "encoder_learning_rate": train.encoder_learning_rate * factor,
            "gradient_norm": norm,
            "samples_per_s": train.global_batch / seconds,
            "data_wait_s": waited_s,
            "step_s": seconds,
        }

    def _micro_step(self, batch: Batch, step: int, factor: float) -> tuple[Tensor, float | None]:
        config, world = self.config, self.world
        if config.train.log_keys:
            self.log.write_keys(step, batch.keys)
        features = self.engine.encode(*model_inputs(batch, world.device))
        video_ids = batch.video_ids.to(world.device)
        mine = objective(features, video_ids, config.model, config.loss, world)
        # One small collective tells every rank the values, who is not finite, and who skipped.
        skipped = mine.shares.new_tensor([len(batch.replaced)])
        everyone = gather_rows(torch.cat([mine.shares, skipped])[None], world).cpu()
        _stop_unless_finite(everyone, step, batch.keys, world)
        if everyone[:, -1].any():
            for replaced in world.gather_objects(batch.replaced):
                self.log.write_replaced(step, replaced)
        self.engine.backward(mine.for_backward)
        return everyone[:, :-1].sum(0), self.engine.step(factor)

    def _batches(self, start_step: int) -> Iterator[Batch]:
        data, train = self.config.data, self.config.train
        return train_batches(
            data.train,
            seed=train.seed,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            rank=self.world.rank,
            world_size=self.world.world_size,
            start_step=start_step,
            workers=data.workers,
            num_frames=data.num_frames,
            image_size=image_size(self.config.model),
            tokenize=self.tokenizer,
            max_bad=data.max_bad,
            cache_bytes=data.cache_mib << 20,
        )

    def _evaluate(self, step: int) -> Evaluation:
        self.engine.training(False)
        evaluation = evaluate(self.engine.encode, self.config, self.tokenizer, self.world)
        self.engine.training(True)
        self.log.write("evaluation", {"step": step, **evaluation.summary()})
        if self.world.is_first:
            write_evaluation(self.run_dir, evaluation, step)
        return evaluation

    def _save(self, step: int) -> None:
        save_checkpoint(self.engine, self.run_dir / CHECKPOINTS, self._state(step), self.world)

    def _resume(self) -> int:
        found = latest_checkpoint(self.run_dir / CHECKPOINTS)
        step = 0
        if found is not None:
            path, saved = found
            load_checkpoint(self.engine, path, saved, self._state(saved.step), self.world)
            step = saved.step
        self.log.begin(step)
        return step

    def _state(self, step: int) -> SavedState:
        return SavedState(
            step=step,
            world_size=self.world.world_size,
            zero_stage=self.config.train.zero_stage,
        )


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _stop_unless_finite(shares: Tensor, step: int, keys: tuple[str, ...], world: World) -> None:
    """Raises on every rank alike, since all see all ranks' shares (W, ...)."""
    broken = (~shares.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if not broken:
        return
    named = world.gather_objects(keys)[broken[0]]
    raise NonFiniteLoss(
        f"step {step}: the loss is not finite on rank {', '.join(map(str, broken))} of "
        f"{world.world_size}; no weight was changed by this step. Keys of rank {broken[0]}'s "
        f"batch: {' '.join(named)}"
    )
