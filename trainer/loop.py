"""The training loop: step after step, and what is due between them: evaluate, save, log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tvr.data_prep.manifest import check_words, read_manifest
from tvr.data_prep.records import Batch
from tvr.data_prep.stream import train_batches
from tvr.trainer.checkpoint import (
    SavedState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from tvr.trainer.config import Config, shard_cache, views
from tvr.trainer.engine import Engine
from tvr.trainer.errors import TrainingFailed
from tvr.trainer.evaluate import Evaluation, evaluate
from tvr.trainer.model import build_model, image_size, tokenizer_folder
from tvr.trainer.progress import Progress
from tvr.trainer.run_dir import CHECKPOINTS, claim, evaluated_step, write_evaluation
from tvr.trainer.run_log import LogWriter
from tvr.trainer.step import OptimiserStep
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
        TrainingFailed: anything else that broke once training had begun.
    """
    with join_world() as world:
        claim(run_dir, config, world)
        num_samples = _checked_data(config, world)
        tokenizer = load_tokenizer(
            tokenizer_folder(config.model),
            config.data.max_words,
            content_words=config.data.content_words,
        )
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)
        engine = Engine(model, config.train, world)
        # Equal weights on all ranks, but dropout of each rank's own.
        torch.manual_seed(config.train.seed + 1 + world.rank)
        log = LogWriter(run_dir, world.rank)
        step = OptimiserStep(config, engine, log, world, num_samples)
        return _Run(config, run_dir, log, engine, tokenizer, world, step).to_the_end()


@dataclass(frozen=True, slots=True)
class _Run:
    config: Config
    run_dir: Path
    log: LogWriter
    engine: Engine
    tokenizer: Tokenizer
    world: World
    step: OptimiserStep

    def to_the_end(self) -> Evaluation | None:
        train = self.config.train
        start_step = self._resume()
        evaluation = self._missed_evaluation(start_step)
        if 0 < start_step < train.steps:
            self.log.write("resumed", {"step": start_step})
        batches = self._batches(start_step)
        with Progress(train.steps, start_step, enabled=self.world.is_first) as progress:
            for step in range(start_step, train.steps):
                try:
                    evaluation = self._advance(step, batches, progress) or evaluation
                except (ValueError, OSError) as error:
                    # Before the first step these mean bad input; here they mean that a run broke.
                    raise TrainingFailed(f"step {step + 1} on rank {self.world.rank}") from error
        return evaluation

    def _advance(self, step: int, batches: Iterator[Batch], show: Progress) -> Evaluation | None:
        """One step, and what is due after it."""
        train, evaluation = self.config.train, None
        done = step + 1
        record = self.step.take(done, batches)
        if done % train.log_every == 0 or done == train.steps:
            self.log.write("step", record)
        show.step(done, record)
        # Saved first: an evaluation that fails must not cost the steps before it.
        if _due(done, train.save_every, train.steps):
            self._save(done)
        if self._evaluation_due(done):
            evaluation = self._evaluate(done)
            show.text(evaluation.table())
        return evaluation

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
            max_bad_in_a_row=data.max_bad_in_a_row,
            views=views(data),
            decoder=data.decoder,
            word_drop=data.word_drop,
            cache_bytes=data.cache_mib << 20,
            shard_cache=shard_cache(data),
        )

    def _evaluate(self, step: int) -> Evaluation:
        self.engine.training(False)
        evaluation = evaluate(self.engine.encode, self.config, self.tokenizer, self.world)
        self.engine.training(True)
        self.log.write("evaluation", {"step": step, **evaluation.summary()})
        self.log.write_replaced(step, evaluation.left_out)
        if self.world.is_first:
            write_evaluation(self.run_dir, evaluation, step)
        return evaluation

    def _evaluation_due(self, step: int) -> bool:
        train = self.config.train
        return self.config.data.test is not None and _due(step, train.eval_every, train.steps)

    def _missed_evaluation(self, step: int) -> Evaluation | None:
        """Evaluates where an earlier attempt ended between saving a step and evaluating it."""
        if step == 0 or not self._evaluation_due(step):
            return None
        done = self.world.from_first(lambda: evaluated_step(self.run_dir))
        return None if done == step else self._evaluate(step)

    def _save(self, step: int) -> None:
        save_checkpoint(self.engine, self.run_dir / CHECKPOINTS, self._state(step), self.world)

    def _resume(self) -> int:
        found = self.world.from_first(lambda: latest_checkpoint(self.run_dir / CHECKPOINTS))
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


def _checked_data(config: Config, world: World) -> int:
    """The number of training samples; every data set is looked at before anything is built."""
    data = config.data
    train = read_manifest(data.train)
    sets = [(data.train, train)]
    if data.test is not None:
        test = read_manifest(data.test)
        sets.append((data.test, test))
        if test.num_samples < world.world_size:
            raise ValueError(
                f"{data.test} holds {test.num_samples} videos: too few for {world.world_size} ranks"
            )
        if data.test_exchanged is not None:
            exchanged = read_manifest(data.test_exchanged)
            sets.append((data.test_exchanged, exchanged))
            if list(test.samples.key) != list(exchanged.samples.key):
                raise ValueError(
                    f"data.test_exchanged={data.test_exchanged} must hold the same keys in the "
                    f"same order as data.test={data.test}"
                )
    if data.content_words:
        for url, manifest in sets:
            check_words(url, manifest, needed_by="data.content_words")
    return train.num_samples


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
