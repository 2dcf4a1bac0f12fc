"""The table of every metric of training and packing; `tvr metrics` prints it.

The metrics of a step's values come from `step_record`. The others stand here: settings of the run,
counters of a rank, evaluations, checkpoints.

Counters begin at 0 with each start of a run, as Prometheus expects, and never fall within one. A
gauge is absent if it does not apply or is not known. There is no metric of a loss scale, since
neither fp32 nor bf16 has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from tvr.data_prep.exporter.metrics_table import Metric, MetricTable, with_labels
from tvr.data_prep.packing.pack_metrics import PACK_METRICS
from tvr.data_prep.records import BAD_SAMPLE_REASONS
from tvr.trainer.monitoring.field_metric import table_rows
from tvr.trainer.monitoring.step_record import DATA_SET, MonitoredStepRecord

DIRECTIONS = ("text_to_video", "video_to_text")
SPLITS = ("test",)
CUTS = ("1", "5", "10")
_EVALUATION_LABELS = {"split": SPLITS, "direction": DIRECTIONS}

Series: TypeAlias = tuple[str, ...]
"""A metric's name, followed by the values of its labels."""

SAVE_GAUGES: Mapping[str, str] = {
    "seconds": "tvr_checkpoint_seconds",
    "held_up_s": "tvr_checkpoint_held_up_seconds",
    "num_bytes": "tvr_checkpoint_bytes",
}
"""Fields of a save's event in log.jsonl that are gauges."""

RUN_METRICS = (
    Metric(
        name="tvr_train_planned_steps",
        kind="gauge",
        unit="",
        meaning="Optimiser steps of the whole run.",
    ),
    Metric(
        name="tvr_train_steps_total",
        kind="counter",
        unit="",
        meaning="Optimiser steps since this start of the run.",
    ),
    Metric(
        name="tvr_train_pairs_total",
        kind="counter",
        unit="",
        meaning="Pairs trained on, on all ranks.",
    ),
    Metric(
        name="tvr_train_frames_total",
        kind="counter",
        unit="",
        meaning="Frames of these pairs, padding included.",
    ),
    Metric(
        name="tvr_train_frames_per_second",
        kind="gauge",
        unit="",
        meaning="Frames of the last step, on all ranks, divided by its time.",
    ),
    Metric(
        name="tvr_train_global_batch_pairs",
        kind="gauge",
        unit="pairs",
        meaning="Pairs per optimiser step, on all ranks.",
    ),
    Metric(
        name="tvr_train_ranks",
        kind="gauge",
        unit="",
        meaning="Ranks of the job.",
    ),
    Metric(
        name="tvr_train_restarts_total",
        kind="counter",
        unit="",
        meaning="Starts of the run before this one.",
    ),
    Metric(
        name="tvr_train_finished",
        kind="gauge",
        unit="",
        meaning="1 once training is complete or preempted, 0 before.",
    ),
    Metric(
        name="tvr_train_nonfinite_total",
        kind="counter",
        unit="",
        meaning="Losses or gradients that were not finite; each of them ends the job.",
    ),
    Metric(
        name="tvr_train_last_step_timestamp_seconds",
        kind="gauge",
        unit="seconds",
        meaning="Unix time at which the last step ended.",
        per="rank",
    ),
    Metric(
        name="tvr_train_alone_seconds_total",
        kind="counter",
        unit="seconds",
        meaning="Time of a rank's local work in steps, before it needs other ranks: loading and"
        " encoding.",
        per="rank",
    ),
    Metric(
        name="tvr_train_temperature",
        kind="gauge",
        unit="",
        meaning="Temperature of the loss: logits are similarity / temperature.",
    ),
    Metric(
        name="tvr_train_negative_weight",
        kind="gauge",
        unit="",
        meaning="Weight of NegNCE's penalty in the loss.",
    ),
    Metric(
        name="tvr_evaluation_recall_ratio",
        kind="gauge",
        unit="ratio",
        meaning="Recall at k of the last evaluation.",
        labels={**_EVALUATION_LABELS, "k": CUTS},
    ),
    Metric(
        name="tvr_evaluation_median_rank",
        kind="gauge",
        unit="",
        meaning="Median rank of the right answer in the last evaluation, from 1.",
        labels=_EVALUATION_LABELS,
    ),
    Metric(
        name="tvr_evaluation_mean_rank",
        kind="gauge",
        unit="",
        meaning="Mean rank of the right answer in the last evaluation, from 1.",
        labels=_EVALUATION_LABELS,
    ),
    Metric(
        name="tvr_evaluation_binding_accuracy_ratio",
        kind="gauge",
        unit="ratio",
        meaning="Share of captions that are more similar to their own clip than to the same clip"
        " with exchanged attributes.",
    ),
    Metric(
        name="tvr_evaluation_step",
        kind="gauge",
        unit="",
        meaning="Step of the last evaluation.",
    ),
    Metric(
        name="tvr_data_loading_seconds_total",
        kind="counter",
        unit="seconds",
        meaning="Time that a rank waited for its own loader.",
        per="rank",
    ),
    Metric(
        name="tvr_data_decode_failures_total",
        kind="counter",
        unit="",
        meaning="Skipped samples that could not be decoded.",
    ),
    Metric(
        name="tvr_data_bad_samples_limit",
        kind="gauge",
        unit="",
        meaning="Most quarantined samples with which a run continues: data.max_bad. Absent if the"
        " run has several training sets.",
    ),
    Metric(
        name="tvr_data_set_bad_samples_limit",
        kind="gauge",
        unit="",
        meaning="Most quarantined samples of each of several training sets with which a run"
        " continues.",
        labels={DATA_SET: ()},
    ),
    Metric(
        name="tvr_data_skipped_samples_total",
        kind="counter",
        unit="",
        meaning="Bad samples that were replaced on any rank, counted each time they are drawn.",
        labels={"reason": BAD_SAMPLE_REASONS},
    ),
    Metric(
        name="tvr_checkpoint_saves_total",
        kind="counter",
        unit="",
        meaning="Checkpoints published.",
    ),
    Metric(
        name="tvr_checkpoint_failures_total",
        kind="counter",
        unit="",
        meaning="Checkpoints that could not be saved; the run continues without them.",
    ),
    Metric(
        name="tvr_checkpoint_step",
        kind="gauge",
        unit="",
        meaning="Step of the newest checkpoint.",
    ),
    Metric(
        name="tvr_checkpoint_timestamp_seconds",
        kind="gauge",
        unit="seconds",
        meaning="Unix time at which the newest checkpoint was published; its age is time() minus"
        " this.",
    ),
    Metric(
        name="tvr_checkpoint_bytes",
        kind="gauge",
        unit="bytes",
        meaning="Size of the newest checkpoint.",
    ),
    Metric(
        name="tvr_checkpoint_seconds",
        kind="gauge",
        unit="seconds",
        meaning="Time from the start of the newest save to its publication or failure.",
    ),
    Metric(
        name="tvr_checkpoint_held_up_seconds",
        kind="gauge",
        unit="seconds",
        meaning="Time that training was blocked by the newest save.",
    ),
    Metric(
        name="tvr_checkpoint_every_steps",
        kind="gauge",
        unit="steps",
        meaning="Steps between checkpoints; 0: there is one at the end only.",
    ),
)

TRAINING_METRICS = (*table_rows(MonitoredStepRecord), *RUN_METRICS)
METRICS = (*TRAINING_METRICS, *PACK_METRICS)


def training_table(data_sets: Iterable[str] = ()) -> MetricTable:
    """The table of a run.

    Args:
        data_sets: Names of its training sets, if it has several.
    """
    return MetricTable(with_labels(TRAINING_METRICS, {DATA_SET: tuple(data_sets)}))


def evaluation_series(summary: Mapping[str, Any]) -> Iterator[tuple[Series, float]]:
    """The series that an evaluation gives values, from its summary in the log."""
    for direction in DIRECTIONS:
        found, labels = summary[direction], ("test", direction)
        for k in CUTS:
            yield ("tvr_evaluation_recall_ratio", *labels, k), found[f"recall_at_{k}"] / 100
        yield ("tvr_evaluation_median_rank", *labels), found["median_rank"]
        yield ("tvr_evaluation_mean_rank", *labels), found["mean_rank"]
    if summary.get("binding_accuracy") is not None:
        yield ("tvr_evaluation_binding_accuracy_ratio",), summary["binding_accuracy"] / 100
