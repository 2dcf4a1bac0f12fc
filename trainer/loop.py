"""The training loop: optimiser steps and, between them, evaluation, checkpoints and the log.

`train` is the door of the package. `build_run.build_run` builds everything that the steps need.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tvr.data_prep.records import Batch
from tvr.trainer.build_run import TrainingRun, build_run
from tvr.trainer.checkpoint.catalogue import forget_later_scores, record_evaluation
from tvr.trainer.checkpoint.restore import Resume, find_resume_checkpoint
from tvr.trainer.checkpoint.resume_rules import find_changes, rule_of, settings_of
from tvr.trainer.checkpoint.saver import Saver
from tvr.trainer.config import Config
from tvr.trainer.data import build_tokenizer
from tvr.trainer.distributed.world import join_world
from tvr.trainer.errors import NonFiniteLoss, NotSaved, Preempted, TrainingFailed
from tvr.trainer.evaluation.evaluate import evaluate
from tvr.trainer.fencing import begin_attempt
from tvr.trainer.frozen.progress import encoding_report
from tvr.trainer.frozen.tower_outputs import check_settings
from tvr.trainer.memory.garbage import scheduled_garbage_collection
from tvr.trainer.model.model import TextVideoModel
from tvr.trainer.monitoring.monitor import Monitor, monitored
from tvr.trainer.monitoring.progress import Progress
from tvr.trainer.monitoring.run_log import LogWriter
from tvr.trainer.monitoring.step_record import log_event
from tvr.trainer.records import Evaluation, SaveResult
from tvr.trainer.resilience.failures import ErrorReporter, reporting_failures
from tvr.trainer.resilience.preemption import StopNotice, catching_stop_signals
from tvr.trainer.resilience.preflight import check_data, check_disk, check_memory, preflight
from tvr.trainer.resilience.watchdog import Watchdog, running_watchdog
from tvr.trainer.run_dir import (
    Claim,
    checkpoints_of,
    claim,
    evaluated_step,
    remove_later_evaluations,
    retention,
    write_evaluation,
)

# Collectives time out this much later than train.timeout_s, at which the watchdog ends the job.
TIMEOUT_MARGIN_S = 60.0


def train(
    config: Config, run_dir: Path, *, resume: Resume = "auto", report: ErrorReporter | None = None
) -> Evaluation | None:
    """Trains to `train.steps`, resuming from the newest whole checkpoint of the run.

    Every rank of the job calls it.

    Args:
        config: Settings of the run; `run_dir` must be new, or hold a run that may continue with
            them (`checkpoint.resume_rules`).
        run_dir: Folder of the run: configuration, log, checkpoints and results.
        resume: "auto" resumes; "never" refuses a run that has checkpoints.
        report: Writes an error to stderr and returns the exit code. The first rank that fails
            calls it, and `AlreadyReported` then replaces the error on every rank. Without it,
            errors are raised as they are.

    Returns:
        The last evaluation; none without a test set.

    Raises:
        ValueError: settings or data cannot be used, or `run_dir` holds another run.
        PreflightFailed: a check before the first step failed on some rank.
        CheckpointDamaged: the run has checkpoints, and none of them is whole.
        Preempted: a signal asked the job to stop, and its checkpoint is saved.
        Fenced: a newer attempt at the run has begun.
        NonFiniteLoss: the loss or its gradient is not finite; names step, ranks and sample keys.
        NotSaved: the checkpoint of the final step could not be written.
        TooManyBadSamples: more bad samples than `data.max_bad` were found.
        TrainingFailed: any other failure after the first step began.
    """
    with (
        # Collectives time out after the watchdog, which names the rank that the others wait for.
        join_world(config.train.timeout_s + TIMEOUT_MARGIN_S) as world,
        catching_stop_signals() as notice,
        # Entered before failure reporting, so that a failure is reported before the final scrape.
        monitored(config, run_dir, world) as monitor,
        reporting_failures(run_dir, world, report) as failures,
        running_watchdog(config.train, run_dir, world, failures) as watchdog,
    ):
        check_settings(config)
        preflight(config, run_dir, world)
        data_sets = check_data(config.data, config.train, world)
        claimed = claim(run_dir, config, world, data_sets.contents)
        tokenizer = build_tokenizer(config.model, config.data)
        check_memory(config, tokenizer, world)
        attempt = world.run_on_first(lambda: begin_attempt(run_dir))
        saver = Saver(
            checkpoints_of(config.checkpoint, run_dir),
            world,
            attempt,
            retention(config.checkpoint),
            background=config.checkpoint.background,
        )
        log = LogWriter(run_dir, attempt, world)
        checkpoint = find_resume_checkpoint(saver, log, world, resume, run_dir)

        def inspect_model(model: TextVideoModel) -> None:
            check_disk(config.checkpoint, config.train, run_dir, model, world)
            monitor.set_model(model)

        run = build_run(
            config,
            run_dir,
            world,
            attempt=attempt,
            log=log,
            tokenizer=tokenizer,
            num_samples=data_sets.num_samples,
            contents=claimed.contents,
            checkpoint=checkpoint,
            inspect_model=inspect_model,
            watch=monitor.watch,
            report=encoding_report(prints=world.is_first, progress=watchdog.progress),
        )
        return _Loop(run, run_dir, saver, notice, watchdog, monitor, claimed).run_steps()


@dataclass(frozen=True, slots=True)
class _Loop:
    run: TrainingRun
    run_dir: Path
    saver: Saver
    notice: StopNotice
    watchdog: Watchdog
    monitor: Monitor
    claimed: Claim

    def run_steps(self) -> Evaluation | None:
        """Runs the steps that are left, and returns the last evaluation."""
        done, last = self.run.start_step, self.run.config.train.steps
        self._begin(done)
        evaluation = self._evaluate_missed(done)
        batches = self.run.batches()
        with (
            Progress(last, done, enabled=self.run.world.is_first) as progress,
            scheduled_garbage_collection(self.run.config.train.gc_every) as garbage,
        ):
            for step in range(done + 1, last + 1):
                with self._as_training_failure(step):
                    batches = self._regrouped(step - 1, batches)
                    self._train_step(step, batches, progress)
                    self._save_or_stop(step)
                    evaluation = self._evaluate_if_due(step, progress) or evaluation
                garbage.step_finished(step)  # measured as a part of "between"
        with self.watchdog.phase("checkpoint"):
            error = self._finish_saves(last)
        if error is not None:
            raise NotSaved(f"step {last}, the last one, is not saved: {error}")
        return evaluation

    def _begin(self, start_step: int) -> None:
        self.run.log.begin(start_step)
        self.monitor.start(self.run.attempt, start_step)
        if self.run.world.is_first:
            self._forget_later(start_step)
        if 0 < start_step < self.run.config.train.steps:
            values = {"step": start_step, "attempt": self.run.attempt.number}
            self.run.log.write("resumed", values)
            self._log_changes(start_step)

    def _forget_later(self, step: int) -> None:
        """Removes results of steps after `step`, which an earlier attempt lost."""
        try:
            self.run.attempt.check()
            forget_later_scores(self.saver.storage, step)
            remove_later_evaluations(self.run_dir, step)
        except OSError as error:
            self.run.log.warn(f"results of lost steps after step {step} stay: {error}")

    def _log_changes(self, step: int) -> None:
        """Logs each setting that differs from the checkpoint's, and how it takes effect."""
        run, state = self.run, self.run.resumed_from
        assert state is not None, "only a resumed run has a checkpoint to differ from"
        before = settings_of(state, self.claimed.before)
        changes = find_changes(
            state, before, run.config, self.claimed.contents, run.world.world_size
        )
        lines = [(change, rule_of(change.name).text) for change in changes if not change.refused]
        if lines:
            values = {change.name: [change.was, change.now, text] for change, text in lines}
            run.log.write("settings_changed", {"step": step, "settings": values})
            run.log.warn(
                f"settings differ from those of step {step}: "
                + "; ".join(f"{change} ({text})" for change, text in lines)
            )

    @contextmanager
    def _as_training_failure(self, step: int) -> Iterator[None]:
        try:
            yield
        except NonFiniteLoss:
            self.monitor.on_nonfinite()
            raise
        except (ValueError, OSError) as error:
            # Before the first step these errors mean bad input; here they mean a broken run.
            raise TrainingFailed(f"step {step} on rank {self.run.world.rank}") from error

    def _train_step(self, step: int, batches: Iterator[Batch], progress: Progress) -> None:
        train = self.run.config.train
        record = self.run.train_step(step, batches)
        self.watchdog.step_finished(step, record.step_s)
        record = self.monitor.on_step(record, self.run.train_step.counters)
        if step % train.log_every == 0 or step == train.steps:
            self.run.log.write("step", log_event(record))
            self.monitor.on_log(record)
        progress.step(step, record)

    def _regrouped(self, done: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Finds hard batches anew if an epoch begins that needs them; returns the next batches."""
        run = self.run
        if run.hard_epochs is None or not run.hard_epochs.is_due(done):
            return batches
        with self.watchdog.phase("evaluation"):
            run.find_hard_batches(done)
        run.train_step.watch.lap("evaluation")
        run.log.write("hard_batches", {"step": done})
        # The loader has read ahead without the new vectors.
        if isinstance(batches, Generator):
            batches.close()
        return run.batches(done)

    def _save_or_stop(self, step: int) -> None:
        """Saves a checkpoint if one is due, and ends a job that was asked to stop."""
        last = self.run.config.train.steps
        with self.watchdog.phase("checkpoint"):
            stop = self._sync_flags()
            # Saves come before evaluations, whose failure must not cost the steps before it.
            if stop or _is_due(step, self.run.config.checkpoint.every, last):
                state, is_last = self.run.saved_state(step), stop or step == last
                self._record(self.saver.save(state, self.run.state_dict, is_last=is_last))
            if stop and step < last:
                self._stop(step)
        self.run.train_step.watch.lap("save")

    def _sync_flags(self) -> bool:
        """Agrees with all ranks at a step boundary: returns True if any was asked to stop.

        A save advances to its next phase once every rank has finished the present one.
        """
        mine = int(self.saver.is_ready) + 2 * int(self.notice.received)
        flags_by_rank = self.run.world.all_gather_counts(mine)
        if all(flags & 1 for flags in flags_by_rank):
            self._record(self.saver.advance())
        return any(flags & 2 for flags in flags_by_rank)

    def _stop(self, step: int) -> None:
        """Ends a job that was asked to stop, once its checkpoint is written."""
        error = self._finish_saves(step)
        name = self.notice.signal.name if self.notice.signal else "another rank"
        if error is not None:
            raise NotSaved(f"step {step} is not saved: {error}; asked to stop by {name}")
        self.run.log.write("preempted", {"step": step, "by": name})
        raise Preempted(f"step {step} is saved; asked to stop by {name}")

    def _finish_saves(self, step: int) -> str | None:
        """Waits for saves in flight; returns the error of the save of `step`, if it failed."""
        self._record(self.saver.finish())
        last = self.saver.last
        return last.error if last is not None and last.step == step else None

    def _record(self, saves: Sequence[SaveResult]) -> None:
        """Logs saves that have ended."""
        log = self.run.log
        for saved in saves:
            self.monitor.on_save(saved)
            values = {
                "step": saved.step,
                "num_bytes": saved.num_bytes,
                "held_up_s": round(saved.blocked_s, 4),
                "seconds": round(saved.seconds, 4),
                "background": saved.background,
            }
            if saved.no_room is not None:
                values["no_room"] = saved.no_room
            if saved.error is None:
                log.write("saved", values)
            else:
                log.write("save_failed", {**values, "error": saved.error})
                log.warn(f"checkpoint of step {saved.step} not saved: {saved.error}")

    def _evaluate_if_due(self, step: int, progress: Progress) -> Evaluation | None:
        if not self._is_evaluation_due(step):
            return None
        evaluation = self._evaluate(step)
        progress.text(evaluation.table())
        return evaluation

    def _evaluate_missed(self, step: int) -> Evaluation | None:
        """Evaluates a resumed step that an earlier attempt saved but did not evaluate."""
        if step == 0 or not self._is_evaluation_due(step):
            return None
        evaluated = self.run.world.run_on_first(lambda: evaluated_step(self.run_dir))
        return None if evaluated == step else self._evaluate(step)

    def _is_evaluation_due(self, step: int) -> bool:
        train = self.run.config.train
        return self.run.config.data.test is not None and _is_due(
            step, train.eval_every, train.steps
        )

    def _evaluate(self, step: int) -> Evaluation:
        run, began_s = self.run, time.monotonic()
        with self.watchdog.phase("evaluation"):
            run.engine.set_training(False)
            evaluation = evaluate(
                run.engine.encode, run.config, run.tokenizer, run.world, stored=run.stored
            )
            run.engine.set_training(True)
        run.train_step.watch.lap("evaluation")
        self.monitor.on_evaluation(step, evaluation.summary())
        seconds = round(time.monotonic() - began_s, 4)
        run.log.write("evaluation", {"step": step, "seconds": seconds, **evaluation.summary()})
        run.log.write_bad("left_out", step, evaluation.left_out)
        if run.world.is_first:
            run.attempt.check()
            self._store(evaluation, step)
        return evaluation

    def _store(self, evaluation: Evaluation, step: int) -> None:
        """Writes evaluation.json and the score by which the best checkpoint is chosen."""
        config = self.run.config
        try:
            write_evaluation(self.run_dir, evaluation, step)
            # Only a saved step can be kept as the best checkpoint.
            is_saved = step == self.run.start_step
            if is_saved or _is_due(step, config.checkpoint.every, config.train.steps):
                test_set = self.claimed.contents.get("data.test")
                record_evaluation(self.saver.storage, step, evaluation.score, test_set)
        except OSError as error:
            if step == config.train.steps:
                raise
            self.run.log.warn(f"the evaluation of step {step} is only in the log: {error}")


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
