"""The monitor of a rank: it turns the events of the training loop into Prometheus metrics.

In a step the monitor synchronises with no device and no other rank. Every number that it exports is
already on the host, and exporting one assigns to memory that the ranks of a node share
(shared_memory.py). The first rank of a node serves that memory (server.py).
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
from tvr.trainer.config import Config
from tvr.trainer.data import training_sets
from tvr.trainer.distributed.shared_memory import machines, ranks_on_node, shared_rows
from tvr.trainer.distributed.world import World
from tvr.trainer.errors import Preempted
from tvr.trainer.fencing import Attempt
from tvr.trainer.model.model import TextVideoModel
from tvr.trainer.monitoring.counters import RankCounters
from tvr.trainer.monitoring.field_metric import export_field
from tvr.trainer.monitoring.flops import flops_per_pair, peak_flops
from tvr.trainer.monitoring.metrics import evaluation_series, training_table
from tvr.trainer.monitoring.server import MetricsServer, remove_targets
from tvr.trainer.monitoring.step_record import (
    STEP_METRICS,
    MonitoredStepRecord,
    StepRecord,
    log_event,
)
from tvr.trainer.monitoring.stopwatch import LapStopwatch, Stopwatch
from tvr.trainer.monitoring.writers import Writers
from tvr.trainer.records import Finding, SaveResult, raise_findings

MEMORY_EVERY_S = 1.0
# Read from the counters of torch's allocator, which needs no synchronisation.
DEVICE_MEMORY = {
    "allocated": torch.cuda.memory_allocated,
    "peak": torch.cuda.max_memory_allocated,
    "reserved": torch.cuda.memory_reserved,
}


class Monitor:
    """Null monitor: ignores all events. Subclasses override the events that they record."""

    watch: Stopwatch = Stopwatch()
    """Measures the parts of a step."""

    def set_model(self, model: TextVideoModel) -> None:
        """Receives the whole model, before ZeRO partitions it."""

    def start(self, attempt: Attempt, start_step: int) -> None:
        """Called on all ranks when training begins after `start_step` steps.

        Raises:
            PreflightFailed: some rank cannot serve its metrics.
        """

    def on_step(self, record: StepRecord, counters: RankCounters) -> StepRecord:
        """Called after each step; returns the record with the monitor's own values."""
        return record

    def on_log(self, record: StepRecord) -> None:
        """Called when a step's record is written to the log."""

    def on_save(self, saved: SaveResult) -> None:
        """Called when a save of a checkpoint has ended, published or failed."""

    def on_evaluation(self, step: int, summary: Mapping[str, Any]) -> None:
        """Called after the evaluation of `step`, with the summary that the log gets."""

    def on_nonfinite(self) -> None:
        """Called when a loss or a gradient is not finite."""

    def close(self, *, succeeded: bool) -> None:
        """Called at the end of the run; `succeeded` is True if it is complete or preempted."""


@contextmanager
def monitored(config: Config, run_dir: Path, world: World) -> Iterator[Monitor]:
    """Yields the monitor of a run, and closes it when the block ends."""
    monitor = NodeMonitor(config, run_dir, world) if config.metrics.enabled else Monitor()
    try:
        yield monitor
    except BaseException as error:
        monitor.close(succeeded=isinstance(error, Preempted))
        raise
    monitor.close(succeeded=True)


class NodeMonitor(Monitor):
    """Exports a rank's metrics through the endpoint of its node; rank 0 adds those of the run."""

    def __init__(self, config: Config, run_dir: Path, world: World) -> None:
        self._config, self._run_dir, self._world = config, run_dir, world
        self.watch = self._laps = LapStopwatch(world.device)
        self._values: MetricValues | None = None
        self._server: MetricsServer | None = None
        self._writers: Writers | None = None
        self._process = psutil.Process(os.getpid())
        self._memory_read_at = -MEMORY_EVERY_S
        self._host_memory = 0
        self._device_memory: dict[str, int] = {}
        self._run_began_s = 0.0
        self._flops_per_step = 0.0
        peak = peak_flops(config.metrics, config.train, world.device)
        self._peak_flops = None if peak is None else peak * world.world_size

    def set_model(self, model: TextVideoModel) -> None:
        if self._world.is_first:
            flops = flops_per_pair(model, self._config, self._world.world_size)
            self._flops_per_step = self._config.train.global_batch * flops

    def start(self, attempt: Attempt, start_step: int) -> None:
        self._world.run_on_first(lambda: remove_targets(self._run_dir))
        nodes = machines(self._world)
        ranks = ranks_on_node(self._world, nodes)
        table = training_table(sorted(self._config.data.train_sets))
        lines = shared_rows(self._world, ranks, len(table.slots))
        rank, metrics = self._world.rank, self._config.metrics
        self._values = values = MetricValues(table, lines[rank])
        self._run_began_s = attempt.run_began_s()
        self._export_settings(values, attempt, start_step)
        served = {rank: lines[rank]} if metrics.endpoint == "rank" else lines
        finding = None
        if rank == min(served):
            local_rank = ranks.index(rank)
            try:
                self._server = MetricsServer(
                    metrics, self._run_dir, attempt, table, served, local_rank, len(set(nodes))
                )
            except ValueError as error:
                finding = Finding(rank, str(error), is_node_fault=isinstance(error, PortInUse))
        if self._world.is_first:
            self._writers = Writers(self._config, self._run_dir, start_step, attempt.number)
        # No rank trains before every endpoint is known to work.
        gathered = self._world.all_gather_objects((socket.gethostname(), finding))
        raise_findings([found for _, found in gathered if found], [host for host, _ in gathered])
        self._laps.restart()

    def _export_settings(self, values: MetricValues, attempt: Attempt, start_step: int) -> None:
        """Exports the settings, which stay constant during this start of the run."""
        config = self._config
        values.set("tvr_train_step", start_step)
        values.set("tvr_train_planned_steps", config.train.steps)
        values.set("tvr_train_global_batch_pairs", config.train.global_batch)
        values.set("tvr_train_ranks", self._world.world_size)
        values.set("tvr_train_finished", 0)
        values.set("tvr_train_temperature", config.loss.temperature)
        values.set("tvr_checkpoint_every_steps", config.checkpoint.every)
        for each in training_sets(config.data):
            if each.name:
                values.set("tvr_data_set_bad_samples_limit", each.max_bad, each.name)
            else:
                values.set("tvr_data_bad_samples_limit", each.max_bad)
        values.add("tvr_train_restarts_total", attempt.number - 1)
        if start_step:
            values.set("tvr_checkpoint_step", start_step)
        if config.loss.similarity == "neg_nce":
            values.set("tvr_train_negative_weight", config.loss.neg_nce_weight)

    def on_step(self, record: StepRecord, counters: RankCounters) -> StepRecord:
        values, now = self._values, time.time()
        assert values is not None, "start comes first"
        values.set("tvr_train_last_step_timestamp_seconds", now)
        parts = self._laps.pop_finished()
        self._export_local_work(values, counters, parts.get("encode", 0.0))
        self._read_memory()
        flops_per_s = self._flops_per_step / record.step_s
        monitored_record = MonitoredStepRecord(
            **log_event(record),
            goodput=record.trained_s / (now - self._run_began_s),
            model_flops_per_s=flops_per_s,
            mfu=None if self._peak_flops is None else flops_per_s / self._peak_flops,
            parts_s=parts,
            received_bytes=dict(self._world.received_bytes),
            reads=dict(counters.reads),
            host_memory_bytes=self._host_memory,
            device_memory_bytes=dict(self._device_memory),
        )
        for name, found in STEP_METRICS.items():
            if found.per != "run" or self._world.is_first:
                export_field(found, getattr(monitored_record, name), values)
        if self._world.is_first:
            self._export_run_counters(values, record, counters)
        self._mark_changed()
        return monitored_record

    def _export_local_work(
        self, values: MetricValues, counters: RankCounters, encoding_s: float
    ) -> None:
        """Exports this rank's loading and encoding time, and keeps their sum for the next step."""
        loading = "tvr_data_loading_seconds_total"
        counters.local_work_s = counters.loading_s - values.get(loading) + encoding_s
        values.count(loading, counters.loading_s)
        values.add("tvr_train_alone_seconds_total", counters.local_work_s)

    def _export_run_counters(
        self, values: MetricValues, record: StepRecord, counters: RankCounters
    ) -> None:
        pairs, frames = self._config.train.global_batch, self._config.data.num_frames
        values.add("tvr_train_steps_total", 1)
        values.add("tvr_train_pairs_total", pairs)
        values.add("tvr_train_frames_total", pairs * frames)
        values.set("tvr_train_frames_per_second", frames * record.samples_per_s)
        for reason, count in counters.skipped.items():
            values.count("tvr_data_skipped_samples_total", count, reason)
        undecodable = sum(counters.skipped[reason] for reason in UNDECODABLE_REASONS)
        values.count("tvr_data_decode_failures_total", undecodable)

    def _read_memory(self) -> None:
        """Reads the memory of this process and of its GPU, at most once in MEMORY_EVERY_S."""
        now, device = time.monotonic(), self._world.device
        if now - self._memory_read_at < MEMORY_EVERY_S:
            return
        self._memory_read_at = now
        self._host_memory = self._process.memory_info().rss
        if device.type == "cuda":
            self._device_memory = {kind: read(device) for kind, read in DEVICE_MEMORY.items()}

    def on_log(self, record: StepRecord) -> None:
        if self._writers is not None:
            self._writers.write(record.step, "train", log_event(record))

    def on_save(self, saved: SaveResult) -> None:
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
        self._mark_changed()

    def on_evaluation(self, step: int, summary: Mapping[str, Any]) -> None:
        values = self._values
        if values is None or not self._world.is_first:
            return
        if self._writers is not None:
            self._writers.write(step, "evaluation", summary)
        values.set("tvr_evaluation_step", step)
        for (name, *labels), value in evaluation_series(summary):
            values.set(name, value, *labels)
        self._mark_changed()

    def on_nonfinite(self) -> None:
        if self._values is not None and self._world.is_first:
            self._values.add("tvr_train_nonfinite_total", 1)
            self._mark_changed()

    def close(self, *, succeeded: bool) -> None:
        if self._values is not None:
            export_field(STEP_METRICS["parts_s"], self._laps.pop_finished(), self._values)
            if self._world.is_first:
                self._values.set("tvr_train_finished", int(succeeded))
        # The target is withdrawn before the writers close, which may take long: the launcher ends
        # ranks that outlive a preempted one, and a target left behind would raise an alert.
        if self._server is not None:
            self._server.announce_end(succeeded=succeeded)
        if self._writers is not None:
            self._writers.close()
        if self._server is not None:
            self._server.close()

    def _mark_changed(self) -> None:
        if self._server is not None:
            self._server.has_changed = True
