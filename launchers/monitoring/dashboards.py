"""The five Grafana dashboards, as tables of panels."""

from __future__ import annotations

from tvr.launchers.monitoring.grafana import Dashboard, GrafanaPanel, Query
from tvr.launchers.monitoring.queries import RUN, age, increase, latest, per_second, per_step


def _graph(
    title: str, unit: str, description: str, *queries: Query, stacked: bool = False
) -> GrafanaPanel:
    return GrafanaPanel(
        title=title, unit=unit, description=description, queries=queries, stacked=stacked
    )


def _stat(title: str, unit: str, description: str, *queries: Query, width: int = 3) -> GrafanaPanel:
    return GrafanaPanel(
        title=title, unit=unit, description=description, queries=queries, kind="stat", width=width
    )


RECALL = latest("tvr_evaluation_recall_ratio", "split", "direction", "k")
GOODPUT = "Time of the steps that were not lost, divided by the time since the first start."
MFU = "Floating-point operations of the model, divided by the peak of the devices."

# One row a panel: title, unit, description, queries.
# fmt: off
RUN_PANELS = (
    _stat("Step", "short", "Optimiser steps: completed, and planned.",
          latest("tvr_train_step", name="step"), latest("tvr_train_planned_steps", name="of")),
    _stat("Epoch", "short", "Passes over the training set, or over all training sets together.",
          latest("tvr_train_epoch")),
    _stat("Time left", "s", "Extrapolated from the last 15 minutes.",
          latest("run:tvr_train_remaining:seconds")),
    _stat("Throughput", "suffix: pairs/s", "Mean of 5 minutes, over the time spent in steps.",
          latest("run:tvr_train_pairs_per_second:avg")),
    _stat("Goodput", "percentunit", GOODPUT,
          latest("tvr_train_goodput_ratio")),
    _stat("MFU", "percentunit", MFU,
          latest("tvr_train_mfu_ratio")),
    _stat("Restarts, and steps since the last", "short", "Restarts of the run, and steps since.",
          latest("tvr_train_restarts_total", name="restarts"),
          latest("tvr_train_steps_total", name="steps")),
    _stat("Age of the checkpoint", "s", "Work that a failure would lose now.",
          latest("run:tvr_checkpoint_age:seconds")),
    _graph("Loss", "short",
           "total = similarity + weight x tpm_cl. The penalty is part of the similarity loss.",
           latest("tvr_train_loss", "term")),
    _graph("Recall", "percentunit", "Results of the last evaluation.",
           RECALL),
    _graph("Time by part", "percentunit",
           "Shares of the wall time, mean over ranks. A large data wait: see the dashboard tvr:"
           " data. A large gather: a slow network, or a late rank.",
           latest("run:tvr_train_part:ratio", "part"), stacked=True),
    _graph("Pairs per second", "short", "Last step, and the 5-minute mean one hour earlier.",
           latest("tvr_train_pairs_per_second", name="last step"),
           Query(f"run:tvr_train_pairs_per_second:avg{RUN} offset 1h", "{{run}} one hour earlier")),
    _graph("Gradient norm", "short", "Norm of the whole gradient, before clipping.",
           latest("tvr_train_gradient_norm")),
    _graph("Learning rates", "sci", "Rates of heads and towers, before layer decay.",
           latest("tvr_train_learning_rate", "group")),
    _graph("Training data", "short", "Pairs and frames in the displayed time range.",
           increase("tvr_train_pairs_total", "pairs"),
           increase("tvr_train_frames_total", "frames")),
    _graph("Batch and ranks", "short", "Pairs per optimiser step, and ranks of the job.",
           latest("tvr_train_global_batch_pairs", name="pairs"),
           latest("tvr_train_ranks", name="ranks")),
    _graph("Non-finite values", "short",
           "Non-finite losses or gradients, and whether the run has finished normally.",
           latest("tvr_train_nonfinite_total", name="non-finite"),
           latest("tvr_train_finished", name="finished")),
)

DATA_PANELS = (
    _graph("Data wait", "percentunit",
           "Share of the wall time in which steps waited for the batches of all ranks.",
           latest("run:tvr_data_wait:ratio")),
    _graph("Loading, by rank", "percentunit",
           "Share of the time in which a rank waited for its own loader. The highest is the slowest"
           " loader.",
           per_second("tvr_data_loading_seconds_total", "rank")),
    _graph("Data wait, by rank", "percentunit",
           "Share of the time until all ranks had their batch: the slowest loader decides.",
           per_second("tvr_data_wait_seconds_total", "rank")),
    _graph("Reads by source", "reqps",
           "Reads per second. `store` is the slowest: single samples from remote storage.",
           per_second("tvr_data_reads_total", "source"), stacked=True),
    _graph("Cache hits", "percentunit", "Share of the reads from memory and the shard cache.",
           Query(f'sum by (run) (rate(tvr_data_reads_total{{run=~"$run", source=~"memory|'
                 f'shard_cache"}}[$__rate_interval])) / sum by (run) (rate(tvr_data_reads_total'
                 f"{RUN}[$__rate_interval]))", "{{run}}")),
    _graph("Frames per second", "short", "Last step, including padding.",
           latest("tvr_train_frames_per_second")),
    _graph("Skipped samples", "short", "Skips since this start, repeated ones included.",
           latest("tvr_data_skipped_samples_total", "reason")),
    _graph("Bad-sample budget used", "percentunit",
           "Share of data.max_bad, with several training sets of the set that has used most of its"
           " limit. The run stops above 100 %.",
           latest("run:tvr_data_quarantined_samples:ratio")),
    _graph("Bad samples", "short",
           "Distinct bad samples since the run began, the number allowed, and failures to decode.",
           latest("tvr_data_quarantined_samples", name="found"),
           latest("tvr_data_bad_samples_limit", name="allowed"),
           latest("tvr_data_decode_failures_total", name="not decoded")),
    _graph("Training sets: pairs per second", "short", "With several training sets: pairs by set.",
           per_second("tvr_data_set_pairs_total", "data_set"), stacked=True),
    _graph("Training sets: epochs", "short", "Passes over each of several training sets.",
           latest("tvr_data_set_epoch", "data_set")),
    _graph("Training sets: bad samples", "short",
           "By set: distinct bad samples since the run began, the number allowed, and skips since"
           " this start.",
           latest("tvr_data_set_quarantined_samples", "data_set", name="found"),
           latest("tvr_data_set_bad_samples_limit", "data_set", name="allowed"),
           latest("tvr_data_set_skipped_samples_total", "data_set", name="skipped")),
    _graph("Packing: clips per second", "short",
           "Clips packed or refused, and refused clips by reason (`tvr pack --metrics-port`).",
           per_second("tvr_pack_clips_total", name="clips"),
           per_second("tvr_pack_refused_clips_total", "reason")),
    _graph("Packing: clips shown otherwise than stored", "short",
           "Clips per second by what their pictures needed: turned, deinterlaced, tone-mapped.",
           per_second("tvr_pack_adjusted_clips_total", "what")),
    _graph("Packing: progress", "percentunit", "Share of the task's clips that are done.",
           Query(f"max by (run) (tvr_pack_done_clips{RUN}) / max by (run) "
                 f"(tvr_pack_planned_clips{RUN})", "{{run}}")),
    _graph("Packing: bytes per second", "Bps", "Size of the packed samples.",
           per_second("tvr_pack_bytes_total")),
    _graph("Packing: time since the last clip", "s",
           "A growing value means that the storage or a decoder hangs.",
           age("tvr_pack_last_clip_timestamp_seconds")),
)

COMMUNICATION_PANELS = (
    _graph("Straggler gap", "s",
           "Difference between the slowest and the fastest rank's time for loading and encoding in"
           " a step.",
           per_step("tvr_train_straggler_gap_seconds_total")),
    _graph("Straggler gap, share of a step", "percentunit", "Mean of 5 minutes.",
           latest("run:tvr_train_straggler_gap:ratio")),
    _graph("Slowest rank", "short",
           "Always the same rank: check its host. Changing ranks: loading is uneven.",
           latest("tvr_train_slowest_rank")),
    _graph("Loading and encoding, by rank", "s",
           "Time of a rank's own work per step, before the first collective.",
           per_step("tvr_train_alone_seconds_total", "rank")),
    _graph("Step time, by rank", "s", "Last step.",
           latest("tvr_train_step_seconds", "rank")),
    _graph("Time since the last step, by rank", "s",
           "A growing value is a stall. If one rank is older than the others, they wait for it.",
           age("tvr_train_last_step_timestamp_seconds", "rank")),
    _graph("Collectives", "Bps",
           "Bytes per second received by the loss's collectives, all ranks together; without the"
           " weights' gradients.",
           per_second("tvr_train_received_bytes_total", "collective"), stacked=True),
    _graph("Gather and similarity, by rank", "percentunit",
           "Shares of the time. The rank with the shortest gather arrives last.",
           Query('sum by (run, rank, part) (rate(tvr_train_part_seconds_total{run=~"$run", '
                 'part=~"gather|similarity|loss"}[$__rate_interval]))',
                 "{{run}} {{rank}} {{part}}")),
    _graph("Floating-point operations per second", "flops",
           "Operations of the model, all ranks together.",
           latest("tvr_train_model_flops_per_second")),
    _graph("Host memory, by rank", "bytes",
           "Memory of the rank's process, without its loader workers. Growth indicates a leak.",
           latest("tvr_host_memory_bytes", "host", "rank")),
    _graph("GPU memory, by rank", "bytes",
           "Memory of tensors, its peak, and memory reserved by torch.",
           latest("tvr_device_memory_bytes", "kind", "rank")),
    _graph("Checkpoints: time", "s",
           "Duration of the last save, and the time for which a step was blocked.",
           latest("tvr_checkpoint_seconds", name="save"),
           latest("tvr_checkpoint_held_up_seconds", name="blocked")),
    _graph("Checkpoints: size", "bytes", "Size of the newest checkpoint.",
           latest("tvr_checkpoint_bytes")),
    _graph("Checkpoints: steps", "short",
           "Step of the newest checkpoint, steps since, and steps between two checkpoints.",
           latest("tvr_checkpoint_step", name="newest"),
           latest("run:tvr_checkpoint_age:steps", name="since then"),
           latest("tvr_checkpoint_every_steps", name="interval")),
    _graph("Checkpoints: saved and failed", "short", "Saves since this start.",
           latest("tvr_checkpoint_saves_total", name="saved"),
           latest("tvr_checkpoint_failures_total", name="failed")),
)

MINING_PANELS = (
    _graph("Hard negatives per text", "short",
           "Negatives that score above the positive. The number falls as the model learns. If it"
           " stays at the batch size, the model does not learn.",
           latest("tvr_train_hard_negatives_per_row")),
    _graph("Equal captions per text", "short",
           "Videos that are no negatives of a text because another video has its caption. Many of"
           " them mean captions that tell little apart; `tvr stats` lists them.",
           latest("tvr_train_equal_captions_per_row")),
    _graph("Dropped negatives per text", "short",
           "Videos that score above a text's positive by more than loss.drop_above and are no"
           " negatives of it. The number should be small, and fall as the model learns.",
           latest("tvr_train_dropped_negatives_per_row")),
    _graph("Hard-negative penalty", "short", "NegNCE's weighted addition to the loss.",
           Query('max by (run) (tvr_train_loss{run=~"$run", term="penalty"})', "{{run}}")),
    _graph("Penalty, share of the loss", "percentunit", "Share of the similarity loss.",
           Query('max by (run) (tvr_train_loss{run=~"$run", term="penalty"}) / '
                 'max by (run) (tvr_train_loss{run=~"$run", term="similarity"})', "{{run}}")),
    _graph("Similarity of positives and hardest negatives", "short",
           "Means of the last step; at most 1.25 with neighbour frames. They should move apart. If"
           " both approach the maximum, the features collapse.",
           latest("tvr_train_positive_similarity", name="positives"),
           latest("tvr_train_hardest_negative_similarity", name="hardest negatives")),
    _graph("Margin in logits", "short",
           "Positive minus hardest negative similarity, divided by the temperature.",
           Query(f"(max by (run) (tvr_train_positive_similarity{RUN}) - max by (run) "
                 f"(tvr_train_hardest_negative_similarity{RUN})) / max by (run) "
                 f"(tvr_train_temperature{RUN})", "{{run}}")),
    _graph("Positives without gradient", "percentunit",
           "Positives below the clamp of NegNCE's reference mode: the worst ones, which learn"
           " nothing. The mode `log` has no clamp.",
           latest("tvr_train_zero_gradient_positives_ratio")),
    _graph("Penalty weight and temperature", "short",
           "Weight of the hard-negative penalty, and temperature of the logits.",
           latest("tvr_train_negative_weight", name="weight"),
           latest("tvr_train_temperature", name="temperature")),
    _graph("Recall", "percentunit", "Results of the last evaluation.",
           RECALL),
    _graph("Rank of the correct answer", "short", "Median and mean; 1 is the best.",
           latest("tvr_evaluation_median_rank", "split", "direction", name="median"),
           latest("tvr_evaluation_mean_rank", "split", "direction", name="mean")),
    _graph("Binding", "percentunit",
           "Share of captions closer to their clip than to the clip with exchanged attributes."
           " Chance is 50 %.",
           latest("tvr_evaluation_binding_accuracy_ratio")),
    _graph("Step of the last evaluation", "short", "Optimiser step.",
           latest("tvr_evaluation_step")),
)

FLEET_PANELS = (
    _stat("Reachable targets", "short", "Targets that answer, of all configured ones.",
          Query('sum(up{job="tvr"})', "up"), Query('count(up{job="tvr"})', "of"), width=4),
    _stat("Ranks", "short", "Ranks of all runs.",
          Query("sum(max by (run) (tvr_train_ranks))", "ranks"), width=4),
    _stat("Total pairs per second", "short", "Throughput of all runs.",
          Query("sum(run:tvr_train_pairs_per_second:avg)", "pairs/s"), width=4),
    GrafanaPanel(
          title="Alerts", description="Firing alerts; 0 if there is none.", width=12, height=4,
          queries=(Query('max by (alertname, run, severity) (ALERTS{alertstate="firing", '
                         'alertname=~"Tvr.*"}) or on () vector(0)', "{{alertname}} {{run}}"),)),
    GrafanaPanel(title="Runs", description="One row per run.", kind="table", width=24, queries=(
        Query("max by (run) (tvr_train_step)", "step"),
        Query("max by (run) (tvr_train_planned_steps)", "planned"),
        Query("run:tvr_train_pairs_per_second:avg", "pairs/s"),
        Query("run:tvr_train_remaining:seconds", "seconds left"),
        Query("max by (run) (tvr_train_goodput_ratio)", "goodput"),
        Query("max by (run) (tvr_train_ranks)", "ranks"),
        Query("max by (run) (tvr_train_restarts_total)", "restarts"),
        Query('max by (run) (tvr_train_loss{term="total"})', "loss"),
        Query("run:tvr_checkpoint_age:seconds", "seconds since checkpoint"),
        Query('min by (run) (up{job="tvr"})', "reachable"),
    )),
    _graph("Throughput", "short", "Pairs per second.",
           Query("run:tvr_train_pairs_per_second:avg", "{{run}}")),
    _graph("Goodput", "percentunit", GOODPUT,
           Query("max by (run) (tvr_train_goodput_ratio)", "{{run}}")),
    _graph("MFU", "percentunit", MFU,
           Query("max by (run) (tvr_train_mfu_ratio)", "{{run}}")),
    _graph("Data wait", "percentunit", "Share of the wall time.",
           Query("run:tvr_data_wait:ratio", "{{run}}")),
    _graph("Straggler gap", "percentunit", "Share of a step in which ranks wait for the slowest.",
           Query("run:tvr_train_straggler_gap:ratio", "{{run}}")),
    _graph("Failed saves", "short", "Failed saves in the displayed time range.",
           Query("sum by (run) (increase(tvr_checkpoint_failures_total[$__range]))", "{{run}}")),
)
# fmt: on

DASHBOARDS = (
    Dashboard(uid="tvr-run", title="tvr: run", panels=RUN_PANELS),
    Dashboard(uid="tvr-data", title="tvr: data", panels=DATA_PANELS),
    Dashboard(
        uid="tvr-communication",
        title="tvr: communication and memory",
        panels=COMMUNICATION_PANELS,
    ),
    Dashboard(uid="tvr-mining", title="tvr: hard-negative mining", panels=MINING_PANELS),
    Dashboard(uid="tvr-fleet", title="tvr: fleet", panels=FLEET_PANELS, all_runs=True),
)
