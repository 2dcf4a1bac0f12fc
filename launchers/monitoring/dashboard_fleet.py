"""All runs side by side."""

from __future__ import annotations

from tvr.launchers.monitoring.grafana import Dashboard, Panel, Query

FIRING = Query(
    'max by (alertname, run, severity) (ALERTS{alertstate="firing", alertname=~"Tvr.*"})'
    " or on () vector(0)",
    "{{alertname}} {{run}}",
)

FLEET = Dashboard(
    uid="tvr-fleet",
    title="tvr: fleet",
    of_all_runs=True,
    panels=(
        Panel(
            title="Hosts that answer",
            kind="stat",
            width=4,
            queries=(Query('sum(up{job="tvr"})', "up"), Query('count(up{job="tvr"})', "of")),
            about="Of those that should.",
        ),
        Panel(
            title="Ranks",
            kind="stat",
            width=4,
            queries=(Query("sum(max by (run) (tvr_train_ranks))", "ranks"),),
            about="Of all runs.",
        ),
        Panel(
            title="All pairs a second",
            kind="stat",
            width=4,
            queries=(Query("sum(run:tvr_train_pairs_per_second:avg)", "pairs/s"),),
            about="Of all runs.",
        ),
        Panel(
            title="Alerts",
            width=12,
            height=4,
            queries=(FIRING,),
            about="That fire; 0: none.",
        ),
        Panel(
            title="Runs",
            kind="table",
            width=24,
            queries=(
                Query("max by (run) (tvr_train_step)", "step"),
                Query("max by (run) (tvr_train_planned_steps)", "planned"),
                Query("run:tvr_train_pairs_per_second:avg", "pairs/s"),
                Query("run:tvr_train_remaining:seconds", "seconds left"),
                Query("max by (run) (tvr_train_goodput_ratio)", "goodput"),
                Query("max by (run) (tvr_train_ranks)", "ranks"),
                Query("max by (run) (tvr_train_restarts_total)", "restarts"),
                Query('max by (run) (tvr_train_loss{term="total"})', "loss"),
                Query("run:tvr_checkpoint_age:seconds", "seconds since checkpoint"),
                Query('min by (run) (up{job="tvr"})', "answers"),
            ),
            about="One line for each run.",
        ),
        Panel(
            title="Throughput",
            queries=(Query("run:tvr_train_pairs_per_second:avg", "{{run}}"),),
            about="Pairs a second.",
        ),
        Panel(
            title="Goodput",
            unit="percentunit",
            queries=(Query("max by (run) (tvr_train_goodput_ratio)", "{{run}}"),),
            about="Time of the steps that were kept, over the time since the first start.",
        ),
        Panel(
            title="MFU",
            unit="percentunit",
            queries=(Query("max by (run) (tvr_train_mfu_ratio)", "{{run}}"),),
            about="Operations the model needs over what the devices could do at most.",
        ),
        Panel(
            title="Waiting for data",
            unit="percentunit",
            queries=(Query("run:tvr_data_wait:ratio", "{{run}}"),),
            about="Share of the wall time.",
        ),
        Panel(
            title="Waiting for the slowest rank",
            unit="percentunit",
            queries=(Query("run:tvr_train_straggler_gap:ratio", "{{run}}"),),
            about="Share of a step.",
        ),
        Panel(
            title="Failed saves",
            queries=(
                Query(
                    "sum by (run) (increase(tvr_checkpoint_failures_total[$__range]))", "{{run}}"
                ),
            ),
            about="Within the time shown.",
        ),
    ),
)
