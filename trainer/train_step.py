"""One optimiser step: its micro-batches, the loss of their pairs, the update, what is logged."""

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
from tvr.trainer.config import Config, LossConfig, accumulation_steps
from tvr.trainer.distributed.collectives import all_gather_rows
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.engine import Engine
from tvr.trainer.engine.schedule import learning_rate_factor
from tvr.trainer.errors import NonFiniteLoss
from tvr.trainer.loss.gradient_cache import FeatureCache
from tvr.trainer.loss.objective import SHARES, objective
from tvr.trainer.model.model import Features, model_inputs
from tvr.trainer.monitoring.counters import Tally
from tvr.trainer.monitoring.run_log import LogWriter
from tvr.trainer.monitoring.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class OptimiserStep:
    """Takes the steps of a run; all ranks take them together."""

    config: Config
    engine: Engine
    log: LogWriter
    world: World
    num_samples: int
    """Of the training set: an epoch."""
    quarantine: dict[str, str] = field(default_factory=dict)
    """Keys of the bad samples met so far, on any rank, each with its reason."""
    counters: dict[str, float] = field(default_factory=lambda: {"trained_s": 0.0})
    """What goes on counting after a restart."""
    watch: Stopwatch = field(default_factory=Stopwatch)
    tally: Tally = field(default_factory=Tally)

    def go_on(self, saved: SavedState) -> None:
        """Takes over what a checkpoint counted."""
        self.quarantine.update(saved.quarantine)
        self.counters.update(saved.metrics)

    def take(self, step: int, batches: Iterator[Batch]) -> dict[str, Any]:
        """Step number `step`, from 1; returns the values of its global batch for the log.

        With the gradient cache the loss is one over all micro-batches; without it each has its own
        and the values are their means.

        Raises:
            NonFiniteLoss: naming step, rank and keys.
            TooManyBadSamples: the budget for bad samples is spent, here or on another rank.
        """
        train = self.config.train
        started, waited_s, norm = time.perf_counter(), 0.0, None
        factor = learning_rate_factor(step - 1, warmup_steps=train.warmup_steps, steps=train.steps)
        micro_steps = accumulation_steps(train, self.world.world_size)
        losses = 1 if train.gradient_cache else micro_steps
        totals = torch.zeros(len(SHARES))
        self.watch.lap("between")
        for _ in range(losses):
            before = time.perf_counter()
            micro_batches = [self._next_batch(batches) for _ in range(micro_steps // losses)]
            waited_s += time.perf_counter() - before
            self.watch.lap("data wait")
            shares, norm = self._contrast(micro_batches, step, factor)
            totals += shares / losses
        seconds = time.perf_counter() - started
        self.counters["trained_s"] += seconds
        if norm is not None and not math.isfinite(norm):
            raise NonFiniteLoss(
                f"step {step}: the loss is finite, its gradient is not ({norm}); the weights are "
                "spoiled and were not saved, the newest checkpoint is from before"
            )
        return {
            "step": step,
            "epoch": step * train.global_batch / self.num_samples,
            **_named(totals, self.config.loss),
            "learning_rate": train.learning_rate * factor,
            "encoder_learning_rate": train.encoder_learning_rate * factor,
            "gradient_norm": norm,
            "samples_per_s": train.global_batch / seconds,
            "data_wait_s": waited_s,
            "step_s": seconds,
            "trained_s": self.counters["trained_s"],
            "quarantined": len(self.quarantine),
            **self.tally.straggler(),
        }

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        def load() -> Batch:
            before = time.perf_counter()
            batch = next(batches)
            self.tally.loading_s += time.perf_counter() - before
            return batch

        batch = self.world.run_on_all(load, TooManyBadSamples)
        self.tally.reads.update(batch.reads)
        return batch

    def _contrast(
        self, micro_batches: Sequence[Batch], step: int, factor: float
    ) -> tuple[Tensor, float | None]:
        """One loss over micro-batches, and its gradient: the values; the norm, if a step ended."""
        norm = None

        def backward(loss: Tensor) -> None:
            nonlocal norm
            self.engine.backward(loss)
            self.watch.lap("backward")
            norm = self.engine.step(factor)
            self.watch.lap("optimiser")

        if self.config.train.log_keys:
            for batch in micro_batches:
                self.log.write_keys(step, batch.keys)
        if self.config.train.gradient_cache:
            cache = FeatureCache(self._encode, micro_batches, self.world.device)
            loss, values = self._loss(cache.features, micro_batches, step)
            loss.backward()
            self.watch.lap("backward")
            # DeepSpeed takes micro-steps for batches of their own, whose gradients it averages by
            # dividing each loss by their number; here they are the parts of one sum.
            cache.replay(lambda part: backward(part * len(micro_batches)))
        else:
            (batch,) = micro_batches
            loss, values = self._loss(self._encode(batch), micro_batches, step)
            backward(loss)
        return values, norm

    def _encode(self, batch: Batch) -> Features:
        features = self.engine.encode(*model_inputs(batch, self.world.device))
        self.watch.lap("encode")
        return features

    def _loss(
        self, features: Features, micro_batches: Sequence[Batch], step: int
    ) -> tuple[Tensor, Tensor]:
        """This rank's loss to differentiate, and the values over all ranks, which are finite."""
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
            watch=self.watch,
        )
        replaced = [entry for batch in micro_batches for entry in batch.replaced]
        # One small collective tells every rank the values, who is not finite, who skipped, and how
        # long each worked in the step before.
        more = mine.shares.new_tensor([len(replaced), self.tally.alone_s or 0.0])
        line = torch.cat([mine.shares, more])
        everyone = all_gather_rows(line[None], world, (1,) * world.world_size).cpu()
        keys = [key for batch in micro_batches for key in batch.keys]
        _stop_unless_finite(everyone, step, keys, world)
        self.watch.lap("loss")
        values, skipped, alone_s = everyone[:, :-2], everyone[:, -2], everyone[:, -1]
        self.tally.everyones_s = tuple(alone_s.tolist())
        if skipped.any():
            bad = [entry for entries in world.all_gather_objects(replaced) for entry in entries]
            self.log.write_bad("replaced", step, bad)
            self.tally.skipped.update(entry.reason for entry in bad)
            self._set_apart(bad)
        return mine.for_backward, values.sum(0)

    def _set_apart(self, entries: Sequence[Replacement]) -> None:
        """All ranks' bad samples count for the run's budget, and those of its earlier starts."""
        data = self.config.data
        budget = BadSampleBudget(
            data.max_bad, f"in {data.train} on all ranks", known=self.quarantine
        )
        for entry in entries:
            self.quarantine[entry.key] = entry.reason
            budget.record_bad(entry.key, entry.reason, entry.detail)


def _named(totals: Tensor, loss: LossConfig) -> dict[str, float | None]:
    """The values of a step by name; what these settings do not compute is none, not 0."""
    named: dict[str, float | None] = dict(zip(SHARES, totals.tolist(), strict=True))
    if not loss.tpm_cl:
        named["tpm_cl_loss"] = None
    if loss.similarity == "info_nce":
        named["penalty"] = None
    if (loss.similarity, loss.neg_nce_mode) != ("neg_nce", "reference"):
        named["clamped_share"] = None
    return named


def _stop_unless_finite(shares: Tensor, step: int, keys: Sequence[str], world: World) -> None:
    """Raises on every rank alike, since all see all ranks' shares (W, ...)."""
    broken = (~shares.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if not broken:
        return
    named = world.all_gather_objects(keys)[broken[0]]
    raise NonFiniteLoss(
        f"step {step}: the loss is not finite on rank {', '.join(map(str, broken))} of "
        f"{world.world_size}; no weight was changed by this step. Keys of rank {broken[0]}'s "
        f"batch: {' '.join(named)}"
    )
