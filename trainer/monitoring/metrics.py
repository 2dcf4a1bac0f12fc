"""Every metric of training and packing, in one table: what `tvr metrics` prints, and what the
endpoint and the files in run_dir/metrics hold.

Counters begin anew with each start of a run, as Prometheus expects, and never fall within one. A
gauge that does not apply, or is not known, is absent. There is no loss scale: neither fp32 nor bf16
has one.
"""

from __future__ import annotations

from tvr.data_prep.exporter.metrics_table import Metric, MetricTable
from tvr.data_prep.packing.pack_metrics import PACK_METRICS
from tvr.data_prep.records import BAD_SAMPLE_REASONS, READ_SOURCES
from tvr.trainer.distributed.world import RECEIVED
from tvr.trainer.monitoring.stopwatch import ALL_PARTS

TERMS = ("total", "similarity", "tpm_cl", "penalty")
DIRECTIONS = ("text_to_video", "video_to_text")
SPLITS = ("test",)
CUTS = ("1", "5", "10")
GROUPS = ("heads", "towers")
_WAYS = {"split": SPLITS, "direction": DIRECTIONS}

TRAINING_METRICS = (
    # What the run is doing.
    Metric(
        name="tvr_train_step",
        kind="gauge",
        unit="",
        meaning="Optimiser steps done since the run's beginning.",
    ),
    Metric(
        name="tvr_train_planned_steps",
        kind="gauge",
        unit="",
        meaning="Optimiser steps at which the run ends.",
    ),
    Metric(
        name="tvr_train_epoch",
        kind="gauge",
        unit="",
        meaning="Passes through the training set, with fraction.",
    ),
    Metric(
        name="tvr_train_steps_total",
        kind="counter",
        unit="",
        meaning="Optimiser steps of this start of the run.",
    ),
    Metric(
        name="tvr_train_pairs_total",
        kind="counter",
        unit="",
        meaning="Pairs trained on, all ranks together.",
    ),
    Metric(
        name="tvr_train_frames_total",
        kind="counter",
        unit="",
        meaning="Frames of these pairs, padding included.",
    ),
    Metric(
        name="tvr_train_pairs_per_second",
        kind="gauge",
        unit="",
        meaning="Pairs of the last step over its time, all ranks together.",
    ),
    Metric(
        name="tvr_train_frames_per_second",
        kind="gauge",
        unit="",
        meaning="Frames of the last step over its time, all ranks together.",
    ),
    Metric(
        name="tvr_train_global_batch_pairs",
        kind="gauge",
        unit="pairs",
        meaning="Pairs per optimiser step, all ranks together.",
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
        name="tvr_train_goodput_ratio",
        kind="gauge",
        unit="ratio",
        meaning="Time of the steps that were kept over the time since the run's first start.",
    ),
    Metric(
        name="tvr_train_finished",
        kind="gauge",
        unit="",
        meaning="1 once training has come to its end or was preempted, 0 before.",
    ),
    Metric(
        name="tvr_train_nonfinite_total",
        kind="counter",
        unit="",
        meaning="Losses or gradients that were not finite; each ends the job.",
    ),
    # Where its time goes.
    Metric(
        name="tvr_train_step_seconds",
        kind="gauge",
        unit="seconds",
        meaning="Time of the last step.",
        per="rank",
    ),
    Metric(
        name="tvr_train_part_seconds_total",
        kind="counter",
        unit="seconds",
        meaning="Time of the parts of steps; between: what lies between two of them. On a GPU by"
        " its own clock, added once it is known without waiting for it.",
        per="rank",
        labels={"part": tuple(part.replace(" ", "_") for part in ALL_PARTS)},
    ),
    Metric(
        name="tvr_train_last_step_timestamp_seconds",
        kind="gauge",
        unit="seconds",
        meaning="When the last step ended, in Unix time.",
        per="rank",
    ),
    Metric(
        name="tvr_train_alone_seconds_total",
        kind="counter",
        unit="seconds",
        meaning="What the rank did in steps before it needed others: loading, encoding.",
        per="rank",
    ),
    Metric(
        name="tvr_train_straggler_gap_seconds_total",
        kind="counter",
        unit="seconds",
        meaning="How much longer each step's slowest rank took for that than its fastest.",
    ),
    Metric(
        name="tvr_train_slowest_rank",
        kind="gauge",
        unit="",
        meaning="Which rank the slowest one was.",
    ),
    Metric(
        name="tvr_train_model_flops_per_second",
        kind="gauge",
        unit="",
        meaning="Floating-point operations that the last step needed by its model, over its time:"
        " towers and similarity, forward and backward, all ranks; without what is computed again.",
    ),
    Metric(
        name="tvr_train_mfu_ratio",
        kind="gauge",
        unit="ratio",
        meaning="The same over what the ranks' devices could do at most, where that is known.",
    ),
    Metric(
        name="tvr_train_received_bytes_total",
        kind="counter",
        unit="bytes",
        meaning="Bytes that came by the loss's collectives: features, their gradients, statistics."
        " The weights' gradients are DeepSpeed's and not in it.",
        per="node",
        labels={"collective": RECEIVED},
    ),
    # What it learns.
    Metric(
        name="tvr_train_loss",
        kind="gauge",
        unit="",
        meaning="Terms of the last step's loss: total = similarity + weight x tpm_cl, and penalty,"
        " the part of similarity that NegNCE adds for hard negatives.",
        labels={"term": TERMS},
    ),
    Metric(
        name="tvr_train_learning_rate",
        kind="gauge",
        unit="",
        meaning="Of the last step, before layer decay.",
        labels={"group": GROUPS},
    ),
    Metric(
        name="tvr_train_gradient_norm",
        kind="gauge",
        unit="",
        meaning="Of the whole gradient, before clipping.",
    ),
    Metric(
        name="tvr_train_temperature",
        kind="gauge",
        unit="",
        meaning="Logits are similarity / temperature.",
    ),
    Metric(
        name="tvr_train_negative_weight",
        kind="gauge",
        unit="",
        meaning="Weight of NegNCE's penalty in the loss.",
    ),
    Metric(
        name="tvr_train_hard_negatives_per_row",
        kind="gauge",
        unit="",
        meaning="Negatives of a text that score above its positive or above their own, mean.",
    ),
    Metric(
        name="tvr_train_zero_gradient_positives_ratio",
        kind="gauge",
        unit="ratio",
        meaning="Positives under the clamp of NegNCE's reference mode, which get no gradient.",
    ),
    Metric(
        name="tvr_train_positive_similarity",
        kind="gauge",
        unit="",
        meaning="Score of texts with their own video before the temperature, mean of the last"
        " step: no cosine, but weighted means of the best cosines of sentence and words with frames"
        " and of frames with these. Within +-1; +-1.25 with model.neighbour_frames, which add what"
        " the frame most like the best one has; +-1.625 with data.content_words in att_wti, too.",
    ),
    Metric(
        name="tvr_train_hardest_negative_similarity",
        kind="gauge",
        unit="",
        meaning="The same score of texts with the other video of their batch that has the highest,"
        " mean of the last step.",
    ),
    Metric(
        name="tvr_evaluation_recall_ratio",
        kind="gauge",
        unit="ratio",
        meaning="Recall at k of the last evaluation.",
        labels={**_WAYS, "k": CUTS},
    ),
    Metric(
        name="tvr_evaluation_median_rank",
        kind="gauge",
        unit="",
        meaning="Median rank of the right answer in the last evaluation, from 1.",
        labels=_WAYS,
    ),
    Metric(
        name="tvr_evaluation_mean_rank",
        kind="gauge",
        unit="",
        meaning="Mean rank of the right answer in the last evaluation, from 1.",
        labels=_WAYS,
    ),
    Metric(
        name="tvr_evaluation_binding_accuracy_ratio",
        kind="gauge",
        unit="ratio",
        meaning="Captions nearer to their own clip than to its exchanged counterpart.",
    ),
    Metric(
        name="tvr_evaluation_step",
        kind="gauge",
        unit="",
        meaning="Step of the last evaluation.",
    ),
    # Data.
    Metric(
        name="tvr_data_wait_seconds_total",
        kind="counter",
        unit="seconds",
        meaning="Time for which steps waited for the batches of all ranks.",
        per="rank",
    ),
    Metric(
        name="tvr_data_loading_seconds_total",
        kind="counter",
        unit="seconds",
        meaning="Time for which a rank waited for its own loader.",
        per="rank",
    ),
    Metric(
        name="tvr_data_reads_total",
        kind="counter",
        unit="",
        meaning="Samples read for training by where their bytes came from: kept in memory, a local"
        " file, a beton, a shard kept in the cache, a shard fetched for it, a range of a store.",
        per="node",
        labels={"source": READ_SOURCES},
    ),
    Metric(
        name="tvr_data_decode_failures_total",
        kind="counter",
        unit="",
        meaning="Those of the skipped samples that could not be decoded.",
    ),
    Metric(
        name="tvr_data_bad_samples_limit",
        kind="gauge",
        unit="",
        meaning="Most quarantined samples with which a run goes on: data.max_bad.",
    ),
    Metric(
        name="tvr_data_skipped_samples_total",
        kind="counter",
        unit="",
        meaning="Samples replaced since they were bad, on any rank, each time they were met.",
        labels={"reason": BAD_SAMPLE_REASONS},
    ),
    Metric(
        name="tvr_data_quarantined_samples",
        kind="gauge",
        unit="",
        meaning="Different bad samples met since the run's beginning, on any rank.",
    ),
    # Checkpoints.
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
        meaning="Checkpoints that could not be saved; the run goes on without.",
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
        meaning="When the newest checkpoint was published, in Unix time; its age is time() - this.",
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
        meaning="From the start of the newest save to its publication or failure.",
    ),
    Metric(
        name="tvr_checkpoint_held_up_seconds",
        kind="gauge",
        unit="seconds",
        meaning="How long a step waited for the newest save's copy.",
    ),
    Metric(
        name="tvr_checkpoint_every_steps",
        kind="gauge",
        unit="steps",
        meaning="Steps between checkpoints; 0: only at the end.",
    ),
    # Memory.
    Metric(
        name="tvr_host_memory_bytes",
        kind="gauge",
        unit="bytes",
        meaning="Memory of the rank's process that is in RAM; without its loader processes.",
        per="rank",
    ),
    Metric(
        name="tvr_device_memory_bytes",
        kind="gauge",
        unit="bytes",
        meaning="GPU memory of a rank: in tensors, in tensors at the most, and held by torch.",
        per="rank",
        labels={"kind": ("allocated", "peak", "reserved")},
    ),
)

TRAINING = MetricTable(TRAINING_METRICS)
METRICS = (*TRAINING_METRICS, *PACK_METRICS)
