"""One optimiser step: its micro-batches, their loss, the update of the weights, and its record."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tvr.data_prep.budget import set_budgets
from tvr.data_prep.mixture import Mixture
from tvr.data_prep.records import (
    TRANSIENT_REASONS,
    Batch,
    Replacement,
    TooManyBadSamples,
    set_of_key,
)
from tvr.kernels.device_transfer import to_device
from tvr.kernels.text_lengths import host_lengths
from tvr.trainer.checkpoint.manifest import SavedState
from tvr.trainer.config import Config, accumulation_steps
from tvr.trainer.data import training_sets
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.engine import Engine
from tvr.trainer.engine.schedule import learning_rate_factor
from tvr.trainer.errors import NonFiniteLoss
from tvr.trainer.loss.gradient_cache import FeatureCache
from tvr.trainer.loss.objective import Objective, objective
from tvr.trainer.loss.pair_gradients import PairGradients
from tvr.trainer.loss.step_values import StepNumbers, StepValues
from tvr.trainer.model.batch_copies import BatchCopies
from tvr.trainer.model.model import Features
from tvr.trainer.monitoring.counters import RankCounters
from tvr.trainer.monitoring.run_log import LogWriter
from tvr.trainer.monitoring.step_record import LOSS_TERMS, StepRecord, computed_terms
from tvr.trainer.monitoring.stopwatch import Stopwatch

# Names in the message of an error; a large job has thousands.
MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class TrainStep:
    """Runs the optimiser steps of a run; every rank calls it for the same steps."""

    config: Config
    engine: Engine
    log: LogWriter
    world: World
    num_samples: Mapping[str, int]
    """Samples of each training set by its name; all of them make an epoch."""
    mixture: Mixture | None = None
    """The order of several training sets."""
    quarantine: dict[str, str] = field(default_factory=dict)
    """Reason of every bad sample found so far on any rank, by key."""
    saved_counters: dict[str, float] = field(default_factory=lambda: {"trained_s": 0.0})
    """Counters that checkpoints keep, so that they continue after a restart."""
    watch: Stopwatch = field(default_factory=Stopwatch)
    copies: BatchCopies = field(default_factory=BatchCopies)
    """Moves batches to the device."""
    counters: RankCounters = field(default_factory=RankCounters)

    def load_counters(self, saved: SavedState) -> None:
        """Restores the quarantine and the counters of a checkpoint."""
        self.quarantine.update(saved.quarantine)
        self.saved_counters.update(saved.metrics)

    def __call__(self, step: int, batches: Iterator[Batch]) -> StepRecord:
        """Runs one step and returns the values of its global batch.

        With the gradient cache there is one loss over all micro-batches. Without it each
        micro-batch has its own loss, and the record holds their means. The host reads the device
        once, before the update (`StepValues.read`).

        Args:
            step: Number of the step, from 1.

        Raises:
            NonFiniteLoss: the loss or its gradient is not finite; names step, ranks and keys.
            TooManyBadSamples: the budget for bad samples is spent on some rank.
        """
        train = self.config.train
        started, waited_s, numbers = time.perf_counter(), 0.0, None
        pairs, values = PairGradients(), StepValues(self.world)
        factor = learning_rate_factor(step - 1, warmup_steps=train.warmup_steps, steps=train.steps)
        micro_steps = accumulation_steps(train, self.world.world_size)
        losses = 1 if train.gradient_cache else micro_steps
        self.watch.lap("between")
        for _ in range(losses):
            before = time.perf_counter()
            micro_batches, counts = self._next_batches(batches, micro_steps // losses, step)
            waited_s += time.perf_counter() - before
            self.watch.lap("data wait")
            numbers = self._forward_backward(micro_batches, counts, step, factor, pairs, values)
        assert numbers is not None, "the last micro-batch of a step is followed by its update"
        seconds = time.perf_counter() - started
        self.saved_counters["trained_s"] += seconds
        gap_s, slowest = self.counters.straggler()
        named: dict[str, Any] = dict(zip(LOSS_TERMS, numbers.terms, strict=True))
        named = computed_terms(named, self.config.loss)
        return StepRecord(
            step=step,
            epoch=step * train.global_batch / sum(self.num_samples.values()),
            **named,
            **self._set_values(step),
            learning_rate=train.learning_rate * factor,
            encoder_learning_rate=train.encoder_learning_rate * factor,
            gradient_norm=numbers.gradient_norm,
            samples_per_s=train.global_batch / seconds,
            data_wait_s=waited_s,
            step_s=seconds,
            trained_s=self.saved_counters["trained_s"],
            quarantined=len(self.quarantine),
            straggler_gap_s=gap_s,
            slowest_rank=slowest,
        )

    def _set_values(self, step: int) -> dict[str, Any]:
        """The values of each of several training sets after a step, by the field of the record."""
        if self.mixture is None:
            return {}
        pairs, names = self.config.train.global_batch, self.mixture.names
        before, now = (self.mixture.drawn(number * pairs) for number in (step - 1, step))
        bad = Counter(map(set_of_key, self.quarantine))
        return {
            "set_epochs": {name: now[name] / self.num_samples[name] for name in names},
            "set_pairs": {name: now[name] - before[name] for name in names},
            "set_skipped": {name: self.counters.skipped_by_set[name] for name in names},
            "set_quarantined": {name: bad[name] for name in names},
        }

    def _next_batches(
        self, batches: Iterator[Batch], number: int, step: int
    ) -> tuple[list[Batch], tuple[int, ...]]:
        """Loads the micro-batches of one loss.

        One exchange between hosts carries whether each rank could, its number of pairs and of
        replaced samples, and the time of its local work in the step before.

        Returns:
            The micro-batches, and the number of pairs of each rank.
        """
        loaded, raised = list[Batch](), None
        try:
            for _ in range(number):
                before = time.perf_counter()
                loaded.append(next(batches))
                self.counters.loading_s += time.perf_counter() - before
        except TooManyBadSamples as error:
            raised = error
        replaced = [entry for batch in loaded for entry in batch.replaced]
        num_pairs = sum(len(batch.keys) for batch in loaded)
        mine = (raised is None, num_pairs, len(replaced), self.counters.local_work_s or 0.0)
        by_rank = self.world.all_gather_numbers(mine)
        is_ok, counts, num_replaced, local_work_s = zip(*by_rank, strict=True)
        self.world.raise_first(raised, is_ok)
        for batch in loaded:
            self.counters.reads.update(batch.reads)
        self.counters.local_work_by_rank_s = local_work_s
        if any(num_replaced):
            bad = [entry for rank in self.world.all_gather_objects(replaced) for entry in rank]
            self.log.write_bad("replaced", step, bad)
            self.counters.skipped.update(entry.reason for entry in bad)
            self.counters.skipped_by_set.update(set_of_key(entry.key) for entry in bad)
            self._add_to_quarantine(bad)
        return loaded, tuple(map(int, counts))

    def _forward_backward(
        self,
        micro_batches: Sequence[Batch],
        counts: Sequence[int],
        step: int,
        factor: float,
        pairs: PairGradients,
        values: StepValues,
    ) -> StepNumbers | None:
        """One loss over the micro-batches and its backward.

        Returns the numbers of the step if the weights were updated.
        """
        numbers = None
        keys = [key for batch in micro_batches for key in batch.keys]

        def update() -> None:
            nonlocal numbers
            numbers = self._update(step, factor, pairs, values)
            self.watch.lap("optimiser")

        if self.config.train.log_keys:
            for batch in micro_batches:
                self.log.write_keys(step, batch.keys)
        if self.config.train.gradient_cache:
            cache = FeatureCache(self._encode, micro_batches, self.world.device)
            mine = self._loss(cache.features, micro_batches, counts)
            values.add(mine.shares, keys)
            mine.for_backward.backward()
            pairs.record(cache.features, keys)
            self.watch.lap("backward")

            def backward(part: Tensor) -> None:
                # DeepSpeed averages the gradients of micro-steps by dividing each loss by their
                # number. Here the micro-steps are the parts of one sum, so the factor undoes it.
                self.engine.backward(part * len(micro_batches))
                self.watch.lap("backward")
                update()

            cache.replay(backward)
        else:
            (batch,) = micro_batches
            features = self._encode(batch)
            pairs.watch(features)
            mine = self._loss(features, micro_batches, counts)
            values.add(mine.shares, keys)
            self.engine.backward(mine.for_backward)
            pairs.record(features, keys)
            self.watch.lap("backward")
            update()
        return numbers

    def _update(
        self, step: int, factor: float, pairs: PairGradients, values: StepValues
    ) -> StepNumbers | None:
        """Ends a micro-step; at the last one, updates the weights if all numbers are finite.

        Returns the numbers of the step, None between updates. Raises NonFiniteLoss on every rank.
        """
        norm, numbers = self.engine.gradient_norm(), None
        if norm is not None:
            # The step's only host synchronisation. All ranks read the same, so they agree.
            numbers = values.read(norm)
            self._raise_unless_finite(step, numbers, pairs)
        self.engine.step(factor)
        return numbers

    def _raise_unless_finite(self, step: int, numbers: StepNumbers, pairs: PairGradients) -> None:
        broken, norm = numbers.non_finite, numbers.gradient_norm
        if broken is not None:
            named = self.world.all_gather_objects(broken.keys)[broken.ranks[0]]
            raise NonFiniteLoss(
                f"step {step}: the loss is not finite on rank {', '.join(map(str, broken.ranks))}"
                f" of {self.world.world_size}; this step changed no weight. Keys of rank"
                f" {broken.ranks[0]}'s batch: {' '.join(named)}"
            )
        if not math.isfinite(norm):
            self._raise_non_finite_gradient(step, norm, pairs)

    def _raise_non_finite_gradient(self, step: int, norm: float, pairs: PairGradients) -> None:
        """Raises NonFiniteLoss; the log gets all the names, the message the first ones."""
        parameters = self.engine.non_finite_parameters()
        suspects = self.world.all_gather_objects(pairs.non_finite_keys())
        all_keys = self.world.all_gather_objects(pairs.keys)
        named = suspects if any(suspects) else all_keys
        by_rank = {str(rank): keys for rank, keys in enumerate(named) if keys}
        values = {"step": step, "norm": str(norm), "parameters": parameters, "keys": by_rank}
        self.log.write("non_finite_gradient", values)
        what = "Pairs with such a gradient at their features"
        if not any(suspects):
            what = "It is finite at the features of all pairs, so a tower's backward made it. Pairs"
        listed = _first([f"rank {rank}: {_first(keys)};" for rank, keys in by_rank.items()])
        raise NonFiniteLoss(
            f"step {step}: the loss is finite, but its gradient is not (norm {norm}); the update"
            " was not applied, and the step is not saved. Parameters:"
            f" {_first(parameters) or 'none alone, but their norm overflows'}. {what}: {listed}"
            " log.jsonl names them all"
        )

    def _encode(self, batch: Batch) -> Features:
        features = self.engine.encode(*self.copies.model_inputs(batch, self.world.device))
        self.watch.lap("encode")
        return features

    def _loss(
        self, features: Features, micro_batches: Sequence[Batch], counts: Sequence[int]
    ) -> Objective:
        """This rank's share of the loss of the micro-batches of all ranks."""
        train, device = self.config.train, self.world.device
        word_mask = torch.cat([batch.word_mask for batch in micro_batches])
        frame_mask = torch.cat([batch.frame_mask for batch in micro_batches])
        video_ids = torch.cat([batch.video_ids for batch in micro_batches])
        caption_ids = torch.cat([batch.caption_ids for batch in micro_batches])
        mine = objective(
            features,
            to_device(video_ids, device),
            self.config.model,
            self.config.loss,
            self.world,
            caption_ids=to_device(caption_ids, device),
            exchange=train.exchange,
            scores=train.scores,
            fast=train.fast_similarity,
            counts=counts,
            lengths=host_lengths(word_mask, frame_mask),
            backend=train.similarity_backend,
            compile_tiles=train.compile_similarity,
            watch=self.watch,
        )
        self.watch.lap("loss")
        return mine

    def _add_to_quarantine(self, entries: Sequence[Replacement]) -> None:
        """Spends the run's budgets, which cover all ranks and earlier starts, on bad samples.

        A read that failed for the moment spends nothing: the sample is read at its next visit. Each
        rank's loader limits such reads.
        """
        sets = training_sets(self.config.data)
        budgets = set_budgets(sets, "on all ranks", known=self.quarantine)
        for entry in entries:
            if entry.reason in TRANSIENT_REASONS:
                continue
            self.quarantine[entry.key] = entry.reason
            budget = budgets[set_of_key(entry.key)]
            budget.record_bad(entry.key, entry.reason, entry.detail)


def _first(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    more = len(names) - MAX_NAMED
    return " ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
