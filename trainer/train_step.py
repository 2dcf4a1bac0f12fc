"""One optimiser step: its micro-batches, their loss, the update of the weights, and its record."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tvr.data_prep.budget import BadSampleBudget
from tvr.data_prep.records import Batch, Replacement, TooManyBadSamples
from tvr.trainer.checkpoint.manifest import SavedState
from tvr.trainer.config import Config, accumulation_steps
from tvr.trainer.distributed.collectives import all_gather_rows
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.engine import Engine
from tvr.trainer.engine.schedule import learning_rate_factor
from tvr.trainer.errors import NonFiniteLoss
from tvr.trainer.loss.gradient_cache import FeatureCache
from tvr.trainer.loss.objective import objective
from tvr.trainer.loss.pair_gradients import PairGradients
from tvr.trainer.model.model import Features, model_inputs
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
    num_samples: int
    """Samples of the training set, which make an epoch."""
    quarantine: dict[str, str] = field(default_factory=dict)
    """Reason of every bad sample found so far on any rank, by key."""
    saved_counters: dict[str, float] = field(default_factory=lambda: {"trained_s": 0.0})
    """Counters that checkpoints keep, so that they continue after a restart."""
    watch: Stopwatch = field(default_factory=Stopwatch)
    counters: RankCounters = field(default_factory=RankCounters)

    def load_counters(self, saved: SavedState) -> None:
        """Restores the quarantine and the counters of a checkpoint."""
        self.quarantine.update(saved.quarantine)
        self.saved_counters.update(saved.metrics)

    def __call__(self, step: int, batches: Iterator[Batch]) -> StepRecord:
        """Runs one step and returns the values of its global batch.

        With the gradient cache there is one loss over all micro-batches. Without it each
        micro-batch has its own loss, and the record holds their means.

        Args:
            step: Number of the step, from 1.

        Raises:
            NonFiniteLoss: the loss or its gradient is not finite; names step, ranks and keys.
            TooManyBadSamples: the budget for bad samples is spent on some rank.
        """
        train = self.config.train
        started, waited_s, norm = time.perf_counter(), 0.0, None
        pairs = PairGradients()
        factor = learning_rate_factor(step - 1, warmup_steps=train.warmup_steps, steps=train.steps)
        micro_steps = accumulation_steps(train, self.world.world_size)
        losses = 1 if train.gradient_cache else micro_steps
        totals = torch.zeros(len(LOSS_TERMS))
        self.watch.lap("between")
        for _ in range(losses):
            before = time.perf_counter()
            micro_batches = [self._next_batch(batches) for _ in range(micro_steps // losses)]
            waited_s += time.perf_counter() - before
            self.watch.lap("data wait")
            terms, norm = self._forward_backward(micro_batches, step, factor, pairs)
            totals += terms / losses
        seconds = time.perf_counter() - started
        self.saved_counters["trained_s"] += seconds
        gap_s, slowest = self.counters.straggler()
        named: dict[str, Any] = dict(zip(LOSS_TERMS, totals.tolist(), strict=True))
        named = computed_terms(named, self.config.loss)
        return StepRecord(
            step=step,
            epoch=step * train.global_batch / self.num_samples,
            **named,
            learning_rate=train.learning_rate * factor,
            encoder_learning_rate=train.encoder_learning_rate * factor,
            gradient_norm=norm,
            samples_per_s=train.global_batch / seconds,
            data_wait_s=waited_s,
            step_s=seconds,
            trained_s=self.saved_counters["trained_s"],
            quarantined=len(self.quarantine),
            straggler_gap_s=gap_s,
            slowest_rank=slowest,
        )

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        def load() -> Batch:
            before = time.perf_counter()
            batch = next(batches)
            self.counters.loading_s += time.perf_counter() - before
            return batch

        batch = self.world.run_on_all(load, TooManyBadSamples)
        self.counters.reads.update(batch.reads)
        return batch

    def _forward_backward(
        self, micro_batches: Sequence[Batch], step: int, factor: float, pairs: PairGradients
    ) -> tuple[Tensor, float | None]:
        """One loss over the micro-batches and its backward.

        Returns the terms of the loss, and the gradient's norm if the weights were updated.
        """
        norm = None
        keys = [key for batch in micro_batches for key in batch.keys]

        def update() -> None:
            nonlocal norm
            norm = self._update(step, factor, pairs)
            self.watch.lap("optimiser")

        if self.config.train.log_keys:
            for batch in micro_batches:
                self.log.write_keys(step, batch.keys)
        if self.config.train.gradient_cache:
            cache = FeatureCache(self._encode, micro_batches, self.world.device)
            loss, terms = self._loss(cache.features, micro_batches, step)
            loss.backward()
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
            loss, terms = self._loss(features, micro_batches, step)
            self.engine.backward(loss)
            pairs.record(features, keys)
            self.watch.lap("backward")
            update()
        return terms, norm

    def _update(self, step: int, factor: float, pairs: PairGradients) -> float | None:
        """Ends a micro-step; at the last one, updates the weights if the gradient is finite.

        Returns the gradient's norm, None between updates. Raises NonFiniteLoss on every rank.
        """
        on_device = self.engine.gradient_norm()
        # The only read of the gradient by the host. All ranks read the same number, so they agree.
        norm = None if on_device is None else on_device.item()
        if norm is not None and not math.isfinite(norm):
            self._raise_non_finite_gradient(step, norm, pairs)
        self.engine.step(factor)
        return norm

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
        features = self.engine.encode(*model_inputs(batch, self.world.device))
        self.watch.lap("encode")
        return features

    def _loss(
        self, features: Features, micro_batches: Sequence[Batch], step: int
    ) -> tuple[Tensor, Tensor]:
        """This rank's loss for the backward, and the terms of the global batch.

        Raises NonFiniteLoss on every rank if some rank's terms are not finite.
        """
        config, world = self.config, self.world
        mine = objective(
            features,
            torch.cat([batch.video_ids for batch in micro_batches]).to(world.device),
            config.model,
            config.loss,
            world,
            exchange=config.train.exchange,
            scores=config.train.scores,
            fast=config.train.fast_similarity,
            backend=config.train.similarity_backend,
            compile_tiles=config.train.compile_similarity,
            watch=self.watch,
        )
        replaced = [entry for batch in micro_batches for entry in batch.replaced]
        # One small collective carries the terms of the loss, the number of replaced samples, and
        # the time of the previous step's local work.
        more = mine.shares.new_tensor([len(replaced), self.counters.local_work_s or 0.0])
        row = torch.cat([mine.shares, more])
        rows = all_gather_rows(row[None], world, (1,) * world.world_size).cpu()
        keys = [key for batch in micro_batches for key in batch.keys]
        _raise_unless_finite(rows, step, keys, world)
        self.watch.lap("loss")
        shares, num_replaced, local_work_s = rows[:, :-2], rows[:, -2], rows[:, -1]
        self.counters.local_work_by_rank_s = tuple(local_work_s.tolist())
        if num_replaced.any():
            bad = [entry for entries in world.all_gather_objects(replaced) for entry in entries]
            self.log.write_bad("replaced", step, bad)
            self.counters.skipped.update(entry.reason for entry in bad)
            self._add_to_quarantine(bad)
        return mine.for_backward, shares.sum(0)

    def _add_to_quarantine(self, entries: Sequence[Replacement]) -> None:
        """Spends the run's budget, which covers all ranks and earlier starts, on bad samples."""
        data = self.config.data
        budget = BadSampleBudget(
            data.max_bad, f"in {data.train} on all ranks", known=self.quarantine
        )
        for entry in entries:
            self.quarantine[entry.key] = entry.reason
            budget.record_bad(entry.key, entry.reason, entry.detail)


def _first(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    more = len(names) - MAX_NAMED
    return " ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _raise_unless_finite(rows: Tensor, step: int, keys: Sequence[str], world: World) -> None:
    """Raises NonFiniteLoss on every rank alike: each of them has all ranks' rows (W, ...)."""
    broken = (~rows.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if not broken:
        return
    named = world.all_gather_objects(keys)[broken[0]]
    raise NonFiniteLoss(
        f"step {step}: the loss is not finite on rank {', '.join(map(str, broken))} of "
        f"{world.world_size}; this step changed no weight. Keys of rank {broken[0]}'s batch: "
        f"{' '.join(named)}"
    )
