"""The values of one optimiser step, each declared once together with its metric.

log.jsonl's step event, the Prometheus series, `tvr metrics` with METRICS.md, and the panels of the
pages are all derived from the fields of `MonitoredStepRecord`. To add a value, add a field here and
set it where it is computed. A term of the loss is a field of `LossRecord`.

This module imports no torch, so that the pages start at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tvr.data_prep.records import READ_SOURCES
from tvr.trainer.config import LossConfig
from tvr.trainer.distributed.collective_names import COLLECTIVES
from tvr.trainer.monitoring.field_metric import field_metrics, label_value, metric
from tvr.trainer.monitoring.loss_record import TRAINING, LossRecord

PARTS = (
    "data wait",
    "encode",
    "gather",
    "similarity",
    "loss",
    "backward",
    "optimiser",
    "save",
    "between",
)
"""Parts of a step, in order; "between" is the time between two steps, for example for the log."""
ALL_PARTS = (*PARTS, "evaluation")
"""An evaluation may lie between two steps."""

DATA_SET = "data_set"
"""Label for the name of one of several training sets, as `data.train_sets` gives it."""
SPEED, DATA, COMMUNICATION = "Speed", "Data", "Communication and memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord(LossRecord):
    """The values of one step that every run logs; None: not known, or not computed."""

    learning_rate: float = field(
        metadata=metric(
            "tvr_train_learning_rate",
            "Learning rate of the last step, before layer decay.",
            label="group",
            label_values=("heads",),
            panel=TRAINING,
        )
    )
    encoder_learning_rate: float = field(
        metadata=metric("tvr_train_learning_rate", label="group", label_values=("towers",))
    )
    gradient_norm: float | None = field(
        metadata=metric(
            "tvr_train_gradient_norm", "Norm of the whole gradient before clipping.", panel=TRAINING
        )
    )
    samples_per_s: float = field(
        metadata=metric(
            "tvr_train_pairs_per_second",
            "Pairs of the last step, on all ranks, divided by its time.",
            panel=SPEED,
        )
    )
    data_wait_s: float = field(
        metadata=metric(
            "tvr_data_wait_seconds_total",
            "Time that steps waited for the batches of all ranks.",
            unit="seconds",
            kind="counter",
            per="rank",
            panel=DATA,
        )
    )
    step_s: float = field(
        metadata=metric(
            "tvr_train_step_seconds",
            "Time of the last step.",
            unit="seconds",
            per="rank",
            panel=SPEED,
        )
    )
    trained_s: float
    """Seconds of all steps since the run began."""
    set_epochs: Mapping[str, float] = field(
        default_factory=dict,
        metadata=metric(
            "tvr_data_set_epoch",
            "Passes over each of several training sets, with their fraction.",
            label=DATA_SET,
            panel=DATA,
        ),
    )
    """Empty, like the other values by set, in a run with one training set."""
    set_pairs: Mapping[str, int] = field(
        default_factory=dict,
        metadata=metric(
            "tvr_data_set_pairs_total",
            "Pairs of each of several training sets, on all ranks.",
            kind="counter",
            label=DATA_SET,
            panel=DATA,
            stacked=True,
        ),
    )
    set_skipped: Mapping[str, int] = field(
        default_factory=dict,
        metadata=metric(
            "tvr_data_set_skipped_samples_total",
            "Bad samples of each of several training sets that were replaced on any rank, counted"
            " each time they are drawn.",
            kind="counter",
            label=DATA_SET,
            is_total=True,
            panel=DATA,
        ),
    )
    set_quarantined: Mapping[str, int] = field(
        default_factory=dict,
        metadata=metric(
            "tvr_data_set_quarantined_samples",
            "Distinct bad samples of each of several training sets, found on any rank since the run"
            " began.",
            label=DATA_SET,
            panel=DATA,
        ),
    )
    quarantined: int = field(
        metadata=metric(
            "tvr_data_quarantined_samples",
            "Distinct bad samples found on any rank since the run began.",
            panel=DATA,
        )
    )
    straggler_gap_s: float | None = field(
        metadata=metric(
            "tvr_train_straggler_gap_seconds_total",
            "Cumulative gap between the slowest and the fastest rank in local work (loading,"
            " encoding).",
            unit="seconds",
            kind="counter",
            panel=COMMUNICATION,
        )
    )
    slowest_rank: int | None = field(
        metadata=metric(
            "tvr_train_slowest_rank",
            "Rank with the slowest local work.",
            panel=COMMUNICATION,
            points=True,
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitoredStepRecord(StepRecord):
    """A step's record with the values that the monitor of a run with metrics measures."""

    goodput: float = field(
        metadata=metric(
            "tvr_train_goodput_ratio",
            "Time of the steps whose result was kept, divided by the time since the run's first"
            " start.",
            unit="ratio",
            panel=SPEED,
        )
    )
    model_flops_per_s: float = field(
        metadata=metric(
            "tvr_train_model_flops_per_second",
            "Floating-point operations of the model in the last step, divided by its time: towers"
            " and similarity, forward and backward, on all ranks; recomputation is not counted.",
            panel=SPEED,
        )
    )
    mfu: float | None = field(
        metadata=metric(
            "tvr_train_mfu_ratio",
            "Model FLOPs utilisation: tvr_train_model_flops_per_second divided by the peak of the"
            " ranks' devices, where it is known.",
            unit="ratio",
            panel=SPEED,
        )
    )
    parts_s: Mapping[str, float] = field(
        metadata=metric(
            "tvr_train_part_seconds_total",
            "Time of the parts of steps; `between` is the time between two steps. On a GPU it is"
            " measured by events in the stream, and added once they have passed.",
            unit="seconds",
            kind="counter",
            per="rank",
            label="part",
            label_values=tuple(label_value(part) for part in ALL_PARTS),
            panel=SPEED,
            stacked=True,
        )
    )
    received_bytes: Mapping[str, int] = field(
        metadata=metric(
            "tvr_train_received_bytes_total",
            "Bytes received by the loss's collectives: features, their gradients, statistics."
            " DeepSpeed's gradients of the weights are not counted.",
            unit="bytes",
            kind="counter",
            per="node",
            label="collective",
            label_values=COLLECTIVES,
            is_total=True,
            panel=COMMUNICATION,
            stacked=True,
        )
    )
    reads: Mapping[str, int] = field(
        metadata=metric(
            "tvr_data_reads_total",
            "Samples read for training, by the source of their bytes: decoded samples in memory,"
            " a local file, a beton, a shard in the node's cache, a shard fetched for the sample,"
            " a range of a store, without cache or of another node's shard, stored tower outputs.",
            kind="counter",
            per="node",
            label="source",
            label_values=READ_SOURCES,
            is_total=True,
            panel=DATA,
            stacked=True,
        )
    )
    host_memory_bytes: int = field(
        metadata=metric(
            "tvr_host_memory_bytes",
            "Resident memory of the rank's process, without its loader workers.",
            unit="bytes",
            per="rank",
            panel=COMMUNICATION,
        )
    )
    device_memory_bytes: Mapping[str, int] = field(
        metadata=metric(
            "tvr_device_memory_bytes",
            "GPU memory of a rank: allocated to tensors, the peak of that, and reserved by torch.",
            unit="bytes",
            per="rank",
            label="kind",
            label_values=("allocated", "peak", "reserved"),
            panel=COMMUNICATION,
        )
    )


def log_event(record: StepRecord) -> dict[str, Any]:
    """The record as the values of log.jsonl's step event."""
    return {entry.name: getattr(record, entry.name) for entry in fields(record)}


STEP_METRICS = field_metrics(MonitoredStepRecord)
"""The metric of every field that has one, by the field's name."""
LOSS_TERMS = tuple(name for name, found in STEP_METRICS.items() if found.is_loss_term)
"""Fields of a step's record that the loss computes, in order."""


def computed_terms(terms: Mapping[str, float], loss: LossConfig) -> dict[str, float | None]:
    """The terms of a step by the field's name; None where these settings do not compute one."""
    return {
        name: value if (applies := STEP_METRICS[name].applies_to) is None or applies(loss) else None
        for name, value in terms.items()
    }
