"""Why a run waits for data, what it left out, and how packing gets on."""

from __future__ import annotations

from tvr.launchers.monitoring.grafana import Dashboard, Panel, Query
from tvr.launchers.monitoring.queries import RUN, latest, per_second, since

DATA = Dashboard(
    uid="tvr-data",
    title="tvr: data",
    panels=(
        Panel(
            title="Waiting for data",
            unit="percentunit",
            queries=(latest("run:tvr_data_wait:ratio"),),
            about="Share of the wall time in which steps waited for the batches of all ranks.",
        ),
        Panel(
            title="Loading, by rank",
            unit="percentunit",
            queries=(per_second("tvr_data_loading_seconds_total", "rank"),),
            about="Share of the time in which a rank waited for its own loader: who is slow.",
        ),
        Panel(
            title="Waiting for all, by rank",
            unit="percentunit",
            queries=(per_second("tvr_data_wait_seconds_total", "rank"),),
            about="The same until all ranks had their batch: as long as the slowest loader takes.",
        ),
        Panel(
            title="Where samples come from",
            stacked=True,
            unit="reqps",
            queries=(per_second("tvr_data_reads_total", "source"),),
            about="Reads a second. Store: one by one from afar, the slowest way.",
        ),
        Panel(
            title="From caches",
            unit="percentunit",
            queries=(
                Query(
                    f'sum by (run) (rate(tvr_data_reads_total{{run=~"$run", source=~"memory|'
                    f'shard_cache"}}[$__rate_interval])) / sum by (run) (rate(tvr_data_reads_total'
                    f"{RUN}[$__rate_interval]))",
                    "{{run}}",
                ),
            ),
            about="Share of the reads that memory and the shard cache served.",
        ),
        Panel(
            title="Frames a second",
            queries=(latest("tvr_train_frames_per_second"),),
            about="Of the last step, padding included.",
        ),
        Panel(
            title="Skipped samples",
            queries=(latest("tvr_data_skipped_samples_total", "reason"),),
            about="Since this start, each time they were met.",
        ),
        Panel(
            title="Budget for bad samples",
            unit="percentunit",
            queries=(latest("run:tvr_data_quarantined_samples:ratio"),),
            about="Spent of data.max_bad; beyond 100 % the run stops.",
        ),
        Panel(
            title="Bad samples",
            queries=(
                latest("tvr_data_quarantined_samples", name="met"),
                latest("tvr_data_bad_samples_limit", name="allowed"),
                latest("tvr_data_decode_failures_total", name="not decoded"),
            ),
            about="Different ones since the run's beginning, how many it may meet, and the skipped"
            " samples that could not be decoded, each time.",
        ),
        Panel(
            title="Packing: clips a second",
            queries=(
                per_second("tvr_pack_clips_total", name="clips"),
                per_second("tvr_pack_refused_clips_total", "reason"),
            ),
            about="Packed or refused, and refused by reason, of `tvr pack --metrics-port`.",
        ),
        Panel(
            title="Packing: done",
            unit="percentunit",
            queries=(
                Query(
                    f"max by (run) (tvr_pack_done_clips{RUN}) / max by (run) "
                    f"(tvr_pack_planned_clips{RUN})",
                    "{{run}}",
                ),
            ),
            about="Clips of the task that are done.",
        ),
        Panel(
            title="Packing: bytes a second",
            unit="Bps",
            queries=(per_second("tvr_pack_bytes_total"),),
            about="Of the samples packed.",
        ),
        Panel(
            title="Packing: since the last clip",
            unit="s",
            queries=(since("tvr_pack_last_clip_timestamp_seconds"),),
            about="One that grows: the store or a decoder hangs.",
        ),
    ),
)
