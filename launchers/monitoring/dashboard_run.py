"""What a run is doing, and where its time goes."""

from __future__ import annotations

from tvr.launchers.monitoring.grafana import Dashboard, Panel, Query
from tvr.launchers.monitoring.queries import RECALL, RUN, latest, so_far

RUN_OVERVIEW = Dashboard(
    uid="tvr-run",
    title="tvr: run",
    panels=(
        Panel(
            title="Step",
            kind="stat",
            width=3,
            queries=(
                latest("tvr_train_step", name="step"),
                latest("tvr_train_planned_steps", name="of"),
            ),
            about="Optimiser steps done, and planned.",
        ),
        Panel(
            title="Epoch",
            kind="stat",
            width=3,
            queries=(latest("tvr_train_epoch"),),
            about="Passes through the training set.",
        ),
        Panel(
            title="Time left",
            kind="stat",
            width=3,
            unit="s",
            queries=(latest("run:tvr_train_remaining:seconds"),),
            about="At the rate of the last 15 minutes.",
        ),
        Panel(
            title="Throughput",
            kind="stat",
            width=3,
            unit="suffix: pairs/s",
            queries=(latest("run:tvr_train_pairs_per_second:avg"),),
            about="Over the time of steps alone, mean of 5 minutes.",
        ),
        Panel(
            title="Goodput",
            kind="stat",
            width=3,
            unit="percentunit",
            queries=(latest("tvr_train_goodput_ratio"),),
            about="Time of the steps that were kept, over the time since the first start.",
        ),
        Panel(
            title="MFU",
            kind="stat",
            width=3,
            unit="percentunit",
            queries=(latest("tvr_train_mfu_ratio"),),
            about="Operations the model needs over what the devices could do at most.",
        ),
        Panel(
            title="Starts, and steps since the last",
            kind="stat",
            width=3,
            queries=(
                latest("tvr_train_restarts_total", name="starts before"),
                latest("tvr_train_steps_total", name="steps"),
            ),
            about="Starts of the run before this one.",
        ),
        Panel(
            title="Age of the checkpoint",
            kind="stat",
            width=3,
            unit="s",
            queries=(latest("run:tvr_checkpoint_age:seconds"),),
            about="What a failure now would cost.",
        ),
        Panel(
            title="Loss",
            queries=(latest("tvr_train_loss", "term"),),
            about="total = similarity + weight x tpm_cl; penalty is part of similarity.",
        ),
        Panel(
            title="Recall",
            unit="percentunit",
            queries=(RECALL,),
            about="Of the last evaluation.",
        ),
        Panel(
            title="Where time goes",
            unit="percentunit",
            stacked=True,
            queries=(latest("run:tvr_train_part:ratio", "part"),),
            about="Shares of the wall time, mean of the ranks. Data wait: see tvr: data. Gather:"
            " the network, or a rank that comes late.",
        ),
        Panel(
            title="Pairs a second",
            queries=(
                latest("tvr_train_pairs_per_second", name="last step"),
                Query(
                    f"run:tvr_train_pairs_per_second:avg{RUN} offset 1h", "{{run}} an hour before"
                ),
            ),
            about="Of the last step, and the mean of 5 minutes an hour before.",
        ),
        Panel(
            title="Gradient norm",
            queries=(latest("tvr_train_gradient_norm"),),
            about="Of the whole gradient, before clipping.",
        ),
        Panel(
            title="Learning rates",
            unit="sci",
            queries=(latest("tvr_train_learning_rate", "group"),),
            about="Of heads and towers, before layer decay.",
        ),
        Panel(
            title="Trained on",
            queries=(
                so_far("tvr_train_pairs_total", "pairs"),
                so_far("tvr_train_frames_total", "frames"),
            ),
            about="Pairs and frames within the time shown.",
        ),
        Panel(
            title="Batch and ranks",
            queries=(
                latest("tvr_train_global_batch_pairs", name="pairs"),
                latest("tvr_train_ranks", name="ranks"),
            ),
            about="Pairs per optimiser step, and ranks of the job.",
        ),
        Panel(
            title="Not finite",
            queries=(
                latest("tvr_train_nonfinite_total", name="not finite"),
                latest("tvr_train_finished", name="finished"),
            ),
            about="Losses or gradients that were not finite, and whether the run has ended well.",
        ),
    ),
)
