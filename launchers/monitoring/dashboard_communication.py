"""Ranks that wait for each other, memory, and checkpoints."""

from __future__ import annotations

from tvr.launchers.monitoring.grafana import Dashboard, Panel, Query
from tvr.launchers.monitoring.queries import latest, per_second, per_step, since

COMMUNICATION = Dashboard(
    uid="tvr-communication",
    title="tvr: communication and memory",
    panels=(
        Panel(
            title="Gap to the slowest rank",
            unit="s",
            queries=(per_step("tvr_train_straggler_gap_seconds_total"),),
            about="How much longer a step's slowest rank loads and encodes than its fastest.",
        ),
        Panel(
            title="Gap, share of a step",
            unit="percentunit",
            queries=(latest("run:tvr_train_straggler_gap:ratio"),),
            about="Mean of 5 minutes.",
        ),
        Panel(
            title="Slowest rank",
            queries=(latest("tvr_train_slowest_rank"),),
            about="Always the same one: its host. Ranks in turns: loading is uneven.",
        ),
        Panel(
            title="Loading and encoding, by rank",
            unit="s",
            queries=(per_step("tvr_train_alone_seconds_total", "rank"),),
            about="What a rank does in a step before it needs others.",
        ),
        Panel(
            title="Step, by rank",
            unit="s",
            queries=(latest("tvr_train_step_seconds", "rank"),),
            about="Time of the last step.",
        ),
        Panel(
            title="Since the last step, by rank",
            unit="s",
            queries=(since("tvr_train_last_step_timestamp_seconds", "rank"),),
            about="A stall; the oldest is the rank that is waited for, if any is older.",
        ),
        Panel(
            title="Collectives",
            unit="Bps",
            stacked=True,
            queries=(per_second("tvr_train_received_bytes_total", "collective"),),
            about="Bytes a second that came by the loss's collectives, all ranks together; the"
            " weights' gradients are not in it.",
        ),
        Panel(
            title="Gather and similarity, by rank",
            unit="percentunit",
            queries=(
                Query(
                    'sum by (run, rank, part) (rate(tvr_train_part_seconds_total{run=~"$run", '
                    'part=~"gather|similarity|loss"}[$__rate_interval]))',
                    "{{run}} {{rank}} {{part}}",
                ),
            ),
            about="Shares of the time. The rank with the shortest gather comes last.",
        ),
        Panel(
            title="Floating-point operations a second",
            unit="flops",
            queries=(latest("tvr_train_model_flops_per_second"),),
            about="That the model needs, all ranks together.",
        ),
        Panel(
            title="Host memory, by rank",
            unit="bytes",
            queries=(latest("tvr_host_memory_bytes", "host", "rank"),),
            about="Of the rank's process, without its loader processes. Growth: a leak.",
        ),
        Panel(
            title="GPU memory, by rank",
            unit="bytes",
            queries=(latest("tvr_device_memory_bytes", "kind", "rank"),),
            about="In tensors, in tensors at the most, and held by torch.",
        ),
        Panel(
            title="Checkpoints: time",
            unit="s",
            queries=(
                latest("tvr_checkpoint_seconds", name="save"),
                latest("tvr_checkpoint_held_up_seconds", name="held up"),
            ),
            about="Of the newest save, from start to end, and for how much of it a step waited.",
        ),
        Panel(
            title="Checkpoints: size",
            unit="bytes",
            queries=(latest("tvr_checkpoint_bytes"),),
            about="Of the newest one.",
        ),
        Panel(
            title="Checkpoints: steps",
            queries=(
                latest("tvr_checkpoint_step", name="newest"),
                latest("run:tvr_checkpoint_age:steps", name="since then"),
                latest("tvr_checkpoint_every_steps", name="between"),
            ),
            about="Of the newest one, since then, and between two of them.",
        ),
        Panel(
            title="Checkpoints: saved and failed",
            queries=(
                latest("tvr_checkpoint_saves_total", name="saved"),
                latest("tvr_checkpoint_failures_total", name="failed"),
            ),
            about="Since this start.",
        ),
    ),
)
