"""The training loop: step after step, and what is due between them: evaluate, save, log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tvr.data_prep.records import Batch
from tvr.trainer.checkpoint.catalogue import note_evaluation
from tvr.trainer.checkpoint.manifest import SavedState
from tvr.trainer.checkpoint.restore import Resume, engine_from, resume_point
from tvr.trainer.checkpoint.saver import Saved, Saver, shard_files
from tvr.trainer.config import Config
from tvr.trainer.data import tokenizer_of, training_batches
from tvr.trainer.distributed.world import World, join_world
from tvr.trainer.engine.engine import Engine
from tvr.trainer.engine.random_state import random_state
from tvr.trainer.errors import NonFiniteLoss, NotSaved, Preempted, TrainingFailed
from tvr.trainer.evaluation.evaluate import Evaluation, evaluate
from tvr.trainer.fencing import begin_attempt
from tvr.trainer.model.model import build_model
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.monitoring.monitor import Monitor, monitored
from tvr.trainer.monitoring.progress import Progress
from tvr.trainer.monitoring.run_log import LogWriter
from tvr.trainer.resilience.failures import Tell, telling
from tvr.trainer.resilience.preemption import Notice, noticing
from tvr.trainer.resilience.preflight import check_data, check_disk, check_memory, preflight
from tvr.trainer.resilience.watchdog import Watchdog, watching
from tvr.trainer.run_dir import (
    checkpoints_of,
    claim,
    evaluated_step,
    retention,
    write_evaluation,
)
from tvr.trainer.train_step import OptimiserStep

# Beyond train.timeout_s, after which the watchdog ends a job within seconds.
TIMEOUT_MARGIN_S = 60.0


def train(
    config: Config, run_dir: Path, *, resume: Resume = "auto", tell: Tell | None = None
) -> Evaluation | None:
    """Trains to `train.steps`, continuing from the newest whole checkpoint of the run.

    Every rank of the job calls it. Returns the last evaluation (none without a test set).
    `resume` "never" refuses a run that has checkpoints. With `tell`, a failure is told on stderr by
    the first rank that fails, and Told is raised on all in its place.

    Raises:
        ValueError: settings, data or a `run_dir` of another configuration that cannot be used.
        PreflightFailed: what was looked at before does not let the run begin.
        CheckpointDamaged: the run has checkpoints, and none is whole.
        Preempted: a signal asked the job to leave, and a checkpoint is saved.
        Fenced: a newer attempt at the run has begun.
        NonFiniteLoss: naming step, rank and keys.
        NotSaved: the checkpoint of the step with which it ends could not be written.
        TooManyBadSamples: the budget `data.max_bad` is spent.
        TrainingFailed: anything else that broke once training had begun.
    """
    with (
        # The watchdog comes first, where it can: it names the rank that is waited for.
        join_world(config.train.timeout_s + TIMEOUT_MARGIN_S) as world,
        noticing() as notice,
        # Outside of what tells a failure, which must not wait for the last scrape.
        monitored(config, run_dir, world) as monitor,
        telling(run_dir, world, tell) as failures,
        watching(config.train, run_dir, world, failures) as watchdog,
    ):
        preflight(config, run_dir, world)
        claim(run_dir, config, world)
        num_samples = check_data(config, world)
        tokenizer = tokenizer_of(config)
        check_memory(config, tokenizer, world)
        attempt = world.from_first(lambda: begin_attempt(run_dir))
        saver = Saver(
            checkpoints_of(config, run_dir),
            world,
            attempt,
            retention(config.checkpoint),
            background=config.checkpoint.background,
        )
        log = LogWriter(run_dir, attempt, world)
        found = resume_point(saver.place, log, world, resume)
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)
        check_disk(config, run_dir, model, world)
        monitor.look_at(model)
        engine = engine_from(found, saver.place, model, config.train, run_dir, world)
        step = OptimiserStep(config, engine, log, world, num_samples, watch=monitor.watch)
        run = _Run(
            config, run_dir, log, engine, tokenizer, world, step, saver, notice, watchdog, monitor
        )
        return run.to_the_end(found.state if found else None)


@dataclass(frozen=True, slots=True)
class _Run:
    config: Config
    run_dir: Path
    log: LogWriter
    engine: Engine
    tokenizer: Tokenizer
    world: World
    step: OptimiserStep
    saver: Saver
    notice: Notice
    watchdog: Watchdog
    monitor: Monitor

    def to_the_end(self, saved: SavedState | None) -> Evaluation | None:
        train = self.config.train
        start_step = saved.step if saved else 0
        self.log.begin(start_step)
        if saved is not None:
            self.step.go_on(saved)
        self.monitor.begin(self.saver.attempt, saved)
        if 0 < start_step < train.steps:
            self.log.write("resumed", {"step": start_step, "attempt": self.saver.attempt.number})
        evaluation = self._missed_evaluation(start_step)
        batches = training_batches(
            self.config,
            self.tokenizer,
            self.world,
            start_step=start_step,
            known_bad=dict(self.step.quarantine),
        )
        with Progress(train.steps, start_step, enabled=self.world.is_first) as progress:
            for step in range(start_step, train.steps):
                try:
                    evaluation = self._advance(step, batches, progress) or evaluation
                except NonFiniteLoss:
                    self.monitor.nonfinite()
                    raise
                except (ValueError, OSError) as error:
                    # Before the first step these mean bad input; here they mean that a run broke.
                    raise TrainingFailed(f"step {step + 1} on rank {self.world.rank}") from error
        with self.watchdog.phase("checkpoint"):
            error = self._last_save(train.steps)
        if error is not None:
            raise NotSaved(f"step {train.steps}, the last one, is not saved: {error}")
        return evaluation

    def _advance(self, step: int, batches: Iterator[Batch], show: Progress) -> Evaluation | None:
        """One step, and what is due after it."""
        train, evaluation = self.config.train, None
        done = step + 1
        record = self.step.take(done, batches)
        self.watchdog.finished(done, record["step_s"])
        record |= self.monitor.step(record, self.step.tally)
        if done % train.log_every == 0 or done == train.steps:
            self.log.write("step", record)
            self.monitor.logged(record)
        show.step(done, record)
        with self.watchdog.phase("checkpoint"):
            leave = self._agree()
            # Saved first: an evaluation that fails must not cost the steps before it.
            if leave or _due(done, self.config.checkpoint.every, train.steps):
                is_last = leave or done == train.steps
                self._tell(self.saver.save(self._state(done), self._staged, is_last=is_last))
            if leave and done < train.steps:
                self._leave(done)
        self.step.watch.lap("save")
        if self._evaluation_due(done):
            evaluation = self._evaluate(done)
            show.text(evaluation.table())
        return evaluation

    def _agree(self) -> bool:
        """What no rank may decide alone: a save goes on once its part is done on all ranks, and
        all leave once one was told to."""
        mine = int(self.saver.is_ready) + 2 * int(self.notice.given)
        everyone = self.world.gather_counts(mine)
        if all(flags & 1 for flags in everyone):
            self._tell(self.saver.go_on())
        return any(flags & 2 for flags in everyone)

    def _leave(self, done: int) -> None:
        error = self._last_save(done)
        name = self.notice.signal.name if self.notice.signal else "another rank"
        if error is not None:
            raise NotSaved(f"step {done} is not saved: {error}; asked to leave by {name}")
        self.log.write("preempted", {"step": done, "by": name})
        raise Preempted(f"step {done} is saved; asked to leave by {name}")

    def _last_save(self, step: int) -> str | None:
        """Waits for the save of this step; what went wrong with it, if anything."""
        self._tell(self.saver.finish())
        last = self.saver.last
        return last.error if last is not None and last.step == step else None

    def _staged(self, copy: bool) -> dict[str, Any]:
        return shard_files(self.engine.stage(copy=copy), self.world.rank, random_state())

    def _state(self, step: int) -> SavedState:
        return SavedState(
            step=step,
            world_size=self.world.world_size,
            zero_stage=self.config.train.zero_stage,
            precision=self.config.train.precision,
            attempt=self.saver.attempt.number,
            quarantine=dict(self.step.quarantine),
            metrics=dict(self.step.counters),
            files={},
        )

    def _tell(self, saves: Sequence[Saved]) -> None:
        for saved in saves:
            self.monitor.saved(saved)
            values = {
                "step": saved.step,
                "num_bytes": saved.num_bytes,
                "held_up_s": round(saved.held_up_s, 4),
                "seconds": round(saved.seconds, 4),
                "background": saved.background,
            }
            if saved.no_room is not None:
                values["no_room"] = saved.no_room
            if saved.error is None:
                self.log.write("saved", values)
            else:
                self.log.write("save_failed", {**values, "error": saved.error})
                self.log.warn(f"checkpoint of step {saved.step} not saved: {saved.error}")

    def _evaluate(self, step: int) -> Evaluation:
        began_s = time.monotonic()
        with self.watchdog.phase("evaluation"):
            self.engine.training(False)
            evaluation = evaluate(self.engine.encode, self.config, self.tokenizer, self.world)
            self.engine.training(True)
        self.step.watch.lap("evaluation")
        self.monitor.evaluated(step, evaluation)
        seconds = round(time.monotonic() - began_s, 4)
        self.log.write("evaluation", {"step": step, "seconds": seconds, **evaluation.summary()})
        self.log.write_bad("left_out", step, evaluation.left_out)
        if self.world.is_first:
            self.saver.attempt.check()
            self._keep(evaluation, step)
        return evaluation

    def _keep(self, evaluation: Evaluation, step: int) -> None:
        try:
            write_evaluation(self.run_dir, evaluation, step)
            # The best of the steps that are saved: of others no checkpoint can be kept.
            if _due(step, self.config.checkpoint.every, self.config.train.steps):
                note_evaluation(self.saver.place, step, evaluation.score)
        except OSError as error:
            if step == self.config.train.steps:
                raise
            self.log.warn(f"of the evaluation of step {step} the log has all that is kept: {error}")

    def _evaluation_due(self, step: int) -> bool:
        train = self.config.train
        return self.config.data.test is not None and _due(step, train.eval_every, train.steps)

    def _missed_evaluation(self, step: int) -> Evaluation | None:
        """Evaluates where an earlier attempt ended between saving a step and evaluating it."""
        if step == 0 or not self._evaluation_due(step):
            return None
        done = self.world.from_first(lambda: evaluated_step(self.run_dir))
        return None if done == step else self._evaluate(step)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
