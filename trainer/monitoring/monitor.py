"""What a run tells of itself while it goes on: the loop says what happened, Prometheus reads it.

Nothing here asks a device or another rank for anything in a step: the numbers are those that the
step has on the host, and writing them is an assignment each to memory that the ranks of a node
share (node_memory.py), the first of which serves them (metrics_server.py).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from tvr.data_prep.exporter.metrics_http import PortInUse
from tvr.data_prep.exporter.metrics_table import MetricValues
from tvr.data_prep.records import UNDECODABLE_REASONS
from tvr.trainer.checkpoint.manifest import SavedState
from tvr.trainer.checkpoint.save_result import SaveResult
from tvr.trainer.config import Config
from tvr.trainer.distributed.shared_memory import ranks_on_node, shared_rows
from tvr.trainer.distributed.world import World
from tvr.trainer.errors import Preempted
from tvr.trainer.evaluation.records import Evaluation
from tvr.trainer.fencing import Attempt
from tvr.trainer.model.model import TextVideoModel
from tvr.trainer.monitoring.counters import Tally
from tvr.trainer.monitoring.flops import flops_per_pair, peak_flops
from tvr.trainer.monitoring.metrics import CUTS, DIRECTIONS, TRAINING
from tvr.trainer.monitoring.server import MetricsServer, forget_targets
from tvr.trainer.monitoring.stopwatch import Laps, Stopwatch
from tvr.trainer.monitoring.writers import Writers
from tvr.trainer.resilience.findings import Finding, raise_findings

MEMORY_EVERY_S = 1.0
# What torch's allocator knows by itself.
OF_DEVICE = {
    "allocated": torch.cuda.memory_allocated,
    "peak": torch.cuda.max_memory_allocated,
    "reserved": torch.cuda.memory_reserved,
}

# Where the values of a step's record go.
GAUGES = {
    "step": ("tvr_train_step",),
    "epoch": ("tvr_train_epoch",),
    "loss": ("tvr_train_loss", "total"),
    "similarity_loss": ("tvr_train_loss", "similarity"),
    "tpm_cl_loss": ("tvr_train_loss", "tpm_cl"),
    "penalty": ("tvr_train_loss", "penalty"),
    "hard_negatives_per_row": ("tvr_train_hard_negatives_per_row",),
    "clamped_share": ("tvr_train_zero_gradient_positives_ratio",),
    "positive_similarity": ("tvr_train_positive_similarity",),
    "hardest_similarity": ("tvr_train_hardest_negative_similarity",),
    "learning_rate": ("tvr_train_learning_rate", "heads"),
    "encoder_learning_rate": ("tvr_train_learning_rate", "towers"),
    "gradient_norm": ("tvr_train_gradient_norm",),
    "samples_per_s": ("tvr_train_pairs_per_second",),
    "slowest_rank": ("tvr_train_slowest_rank",),
    "quarantined": ("tvr_data_quarantined_samples",),
    "goodput": ("tvr_train_goodput_ratio",),
    "model_flops_per_s": ("tvr_train_model_flops_per_second",),
    "mfu": ("tvr_train_mfu_ratio",),
}


class Monitor:
    """Told by the loop of each rank what it did. This one listens to nothing."""

    watch: Stopwatch = Stopwatch()
    """For the parts of a step."""

    def look_at(self, model: TextVideoModel) -> None:
        """The model as it was built."""

    def begin(self, attempt: Attempt, saved: SavedState | None) -> None:
        """Training begins, after what is `saved`. All ranks call it.

        Raises:
            PreflightFailed: some rank cannot serve its metrics.
        """

    def step(self, record: Mapping[str, Any], tally: Tally) -> dict[str, Any]:
        """A step was taken; returns what its record should also say."""
        return {}

    def logged(self, record: Mapping[str, Any]) -> None:
        """A step's record went into the log."""

    def saved(self, saved: SaveResult) -> None:
        """A save has ended, well or not."""

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """The test set was looked at after `step`."""

    def nonfinite(self) -> None:
        """A loss or a gradient was not finite."""

    def end(self, *, well: bool) -> None:
        """The run ends: it is done or preempted, or it breaks."""


@contextmanager
def monitored(config: Config, run_dir: Path, world: World) -> Iterator[Monitor]:
    """The monitor of a run that the block is."""
    monitor = NodeMonitor(config, run_dir, world) if config.metrics.enabled else Monitor()
    try:
        yield monitor
    except BaseException as error:
        monitor.end(well=isinstance(error, Preempted))
        raise
    monitor.end(well=True)


class NodeMonitor(Monitor):
    """The monitor of a rank that shares its numbers with those of its node."""

    def __init__(self, config: Config, run_dir: Path, world: World) -> None:
        self._config, self._run_dir, self._world = config, run_dir, world
        self.watch = self._laps = Laps(world.device)
        self._values: MetricValues | None = None
        self._server: MetricsServer | None = None
        self._writers: Writers | None = None
        self._process = psutil.Process(os.getpid())
        self._memory_at = -MEMORY_EVERY_S
        self._run_began_s = 0.0
        self._flops = 0.0
        peak = peak_flops(config, world.device)
        self._peak_flops = None if peak is None else peak * world.world_size

    def look_at(self, model: TextVideoModel) -> None:
        if self._world.is_first:
            pairs = self._config.train.global_batch
            self._flops = pairs * flops_per_pair(model, self._config, self._world.world_size)

    def begin(self, attempt: Attempt, saved: SavedState | None) -> None:
        self._world.run_on_first(lambda: forget_targets(self._run_dir))
        ranks = ranks_on_node(self._world)
        lines = shared_rows(self._world, ranks, len(TRAINING.slots))
        rank, metrics = self._world.rank, self._config.metrics
        self._values = values = MetricValues(TRAINING, lines[rank])
        self._run_began_s = attempt.run_began_s()
        self._settings(values, attempt, saved)
        shown = {rank: lines[rank]} if metrics.endpoint == "rank" else lines
        finding = None
        if rank == min(shown):
            local_rank = ranks.index(rank)
            try:
                self._server = MetricsServer(metrics, self._run_dir, attempt, shown, local_rank)
            except ValueError as error:
                finding = Finding(rank, str(error), is_node_fault=isinstance(error, PortInUse))
        if self._world.is_first:
            start_step = saved.step if saved else 0
            self._writers = Writers(self._config, self._run_dir, start_step, attempt.number)
        # No rank trains before the others' endpoints are known to work.
        everyone = self._world.all_gather_objects((socket.gethostname(), finding))
        raise_findings([found for _, found in everyone if found], [host for host, _ in everyone])
        self._laps.restart()

    def _settings(self, values: MetricValues, attempt: Attempt, saved: SavedState | None) -> None:
        """What stays as it is."""
        config = self._config
        values.set("tvr_train_step", saved.step if saved else 0)
        values.set("tvr_train_planned_steps", config.train.steps)
        values.set("tvr_train_global_batch_pairs", config.train.global_batch)
        values.set("tvr_train_ranks", self._world.world_size)
        values.set("tvr_train_finished", 0)
        values.set("tvr_train_temperature", config.loss.temperature)
        values.set("tvr_checkpoint_every_steps", config.checkpoint.every)
        values.set("tvr_data_bad_samples_limit", config.data.max_bad)
        values.add("tvr_train_restarts_total", attempt.number - 1)
        if saved is not None:
            values.set("tvr_checkpoint_step", saved.step)
        if config.loss.similarity == "neg_nce":
            values.set("tvr_train_negative_weight", config.loss.neg_nce_weight)

    def step(self, record: Mapping[str, Any], tally: Tally) -> dict[str, Any]:
        values, now = self._values, time.time()
        assert values is not None, "begin comes first"
        values.set("tvr_train_last_step_timestamp_seconds", now)
        values.set("tvr_train_step_seconds", record["step_s"])
        values.add("tvr_data_wait_seconds_total", record["data_wait_s"])
        parts = self._parts(values)
        self._of_the_rank(values, tally, parts.get("encode", 0.0))
        flops_per_s = self._flops / record["step_s"]
        more = {
            "goodput": record["trained_s"] / (now - self._run_began_s),
            "model_flops_per_s": flops_per_s,
            "mfu": None if self._peak_flops is None else flops_per_s / self._peak_flops,
            "parts_s": parts,
            "received_bytes": dict(self._world.received_bytes),
            "reads": dict(tally.reads),
            **self._memory(values),
        }
        if self._world.is_first:
            self._of_the_run(values, {**record, **more}, tally)
        self._changed()
        return more

    def _of_the_rank(self, values: MetricValues, tally: Tally, encoding_s: float) -> None:
        loading = "tvr_data_loading_seconds_total"
        tally.alone_s = tally.loading_s - values.get(loading) + encoding_s
        values.count(loading, tally.loading_s)
        values.add("tvr_train_alone_seconds_total", tally.alone_s)
        for source, count in tally.reads.items():
            values.count("tvr_data_reads_total", count, source)
        for collective, num_bytes in self._world.received_bytes.items():
            values.count("tvr_train_received_bytes_total", num_bytes, collective)

    def _of_the_run(self, values: MetricValues, record: Mapping[str, Any], tally: Tally) -> None:
        for name, place in GAUGES.items():
            metric, *labels = place
            values.set(metric, record[name], *labels)
        pairs, frames = self._config.train.global_batch, self._config.data.num_frames
        values.add("tvr_train_steps_total", 1)
        values.add("tvr_train_pairs_total", pairs)
        values.add("tvr_train_frames_total", pairs * frames)
        values.set("tvr_train_frames_per_second", frames * record["samples_per_s"])
        values.add("tvr_train_straggler_gap_seconds_total", record["straggler_gap_s"] or 0.0)
        for reason, count in tally.skipped.items():
            values.count("tvr_data_skipped_samples_total", count, reason)
        undecodable = sum(tally.skipped[reason] for reason in UNDECODABLE_REASONS)
        values.count("tvr_data_decode_failures_total", undecodable)

    def _parts(self, values: MetricValues) -> dict[str, float]:
        parts = self._laps.take_known()
        for part, seconds in parts.items():
            values.add("tvr_train_part_seconds_total", seconds, part.replace(" ", "_"))
        return parts

    def _memory(self, values: MetricValues) -> dict[str, Any]:
        """Of this process on the host, and on its GPU if it has one; looked at once a second."""
        now, device = time.monotonic(), self._world.device
        kinds = OF_DEVICE if device.type == "cuda" else {}
        if now - self._memory_at >= MEMORY_EVERY_S:
            self._memory_at = now
            values.set("tvr_host_memory_bytes", self._process.memory_info().rss)
            for kind, asked in kinds.items():
                values.set("tvr_device_memory_bytes", asked(device), kind)
        on_device = {kind: int(values.get("tvr_device_memory_bytes", kind)) for kind in kinds}
        on_host = int(values.get("tvr_host_memory_bytes"))
        return {"host_memory_bytes": on_host, "device_memory_bytes": on_device}

    def logged(self, record: Mapping[str, Any]) -> None:
        if self._writers is not None:
            self._writers.write(record["step"], "train", record)

    def saved(self, saved: SaveResult) -> None:
        values = self._values
        if values is None or not self._world.is_first:
            return
        values.set("tvr_checkpoint_seconds", saved.seconds)
        values.set("tvr_checkpoint_held_up_seconds", saved.blocked_s)
        if saved.error is not None:
            values.add("tvr_checkpoint_failures_total", 1)
        else:
            values.add("tvr_checkpoint_saves_total", 1)
            values.set("tvr_checkpoint_step", saved.step)
            values.set("tvr_checkpoint_bytes", saved.num_bytes)
            values.set("tvr_checkpoint_timestamp_seconds", time.time())
        self._changed()

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        values = self._values
        if values is None or not self._world.is_first:
            return
        if self._writers is not None:
            self._writers.write(step, "evaluation", evaluation.summary())
        values.set("tvr_evaluation_step", step)
        for direction in DIRECTIONS:
            way, labels = getattr(evaluation.metrics, direction), ("test", direction)
            for k in CUTS:
                recall = getattr(way, f"recall_at_{k}") / 100
                values.set("tvr_evaluation_recall_ratio", recall, *labels, k)
            values.set("tvr_evaluation_median_rank", way.median_rank, *labels)
            values.set("tvr_evaluation_mean_rank", way.mean_rank, *labels)
        if evaluation.binding_accuracy is not None:
            share = evaluation.binding_accuracy / 100
            values.set("tvr_evaluation_binding_accuracy_ratio", share)
        self._changed()

    def nonfinite(self) -> None:
        if self._values is not None and self._world.is_first:
            self._values.add("tvr_train_nonfinite_total", 1)
            self._changed()

    def end(self, *, well: bool) -> None:
        if self._values is not None:
            self._parts(self._values)
            if self._world.is_first:
                self._values.set("tvr_train_finished", int(well))
        # First, since a tool may take its time, and the launcher ends ranks that outlive one that
        # was preempted: a target that is left behind is one that is missed.
        if self._server is not None:
            self._server.leave(well=well)
        if self._writers is not None:
            self._writers.close()
        if self._server is not None:
            self._server.close()

    def _changed(self) -> None:
        if self._server is not None:
            self._server.has_news = True
