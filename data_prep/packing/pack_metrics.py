"""Prometheus metrics of a running packing job: `tvr pack --metrics-port`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from tvr.data_prep.exporter.metrics_http import MetricsEndpoint
from tvr.data_prep.exporter.metrics_table import Metric, MetricTable, MetricValues
from tvr.data_prep.records import ADJUSTMENTS, BAD_SAMPLE_REASONS

if TYPE_CHECKING:
    # Packing imports webdataset, which imports torch; `tvr metrics` needs the table alone.
    from tvr.data_prep.packing.pack import PackProgress
    from tvr.data_prep.packing.progress import OnProgress

PACK_METRICS = (
    Metric(
        name="tvr_pack_clips_total",
        kind="counter",
        unit="",
        meaning="Clips packed or refused by this process.",
    ),
    Metric(
        name="tvr_pack_done_clips",
        kind="gauge",
        unit="clips",
        meaning="Clips of this task that are done, including those of earlier starts.",
    ),
    Metric(
        name="tvr_pack_planned_clips",
        kind="gauge",
        unit="clips",
        meaning="Clips of this task.",
    ),
    Metric(
        name="tvr_pack_bytes_total",
        kind="counter",
        unit="bytes",
        meaning="Bytes of the samples packed by this process.",
    ),
    Metric(
        name="tvr_pack_refused_clips_total",
        kind="counter",
        unit="",
        meaning="Clips refused by this process.",
        labels={"reason": BAD_SAMPLE_REASONS},
    ),
    Metric(
        name="tvr_pack_adjusted_clips_total",
        kind="counter",
        unit="",
        meaning="Clips packed by this process whose pictures are shown otherwise than stored.",
        labels={"what": ADJUSTMENTS},
    ),
    Metric(
        name="tvr_pack_last_clip_timestamp_seconds",
        kind="gauge",
        unit="seconds",
        meaning="Unix time at which the last clip was done.",
    ),
)
PACK_TABLE = MetricTable(PACK_METRICS)


LOOPBACK = "127.0.0.1"


@contextmanager
def serve_metrics(
    show: OnProgress, port: int | None, address: str = LOOPBACK
) -> Iterator[OnProgress]:
    """Yields a progress callback that calls `show` and updates the metrics of a local endpoint.

    Args:
        port: Port of the endpoint, 0 for any free port; None yields `show` itself.
        address: IP address of the network interface that it listens on.

    Raises:
        ValueError: the port is in use, or the address is not this machine's.
    """
    if port is None:
        yield show
        return
    numbers = np.empty(len(PACK_TABLE.slots))
    endpoint = MetricsEndpoint(lambda: PACK_TABLE.text({0: numbers}), address, port)
    print(f"metrics: http://{endpoint.target}/metrics", flush=True)
    try:
        yield _MetricsUpdater(MetricValues(PACK_TABLE, numbers), show)
    finally:
        endpoint.close()


class _MetricsUpdater:
    def __init__(self, values: MetricValues, show: OnProgress) -> None:
        self._values = values
        self._show = show
        self._last: PackProgress | None = None

    def __call__(self, progress: PackProgress) -> None:
        self._show(progress)
        values, last = self._values, self._last or progress
        values.set("tvr_pack_done_clips", progress.num_done)
        values.set("tvr_pack_planned_clips", progress.num_clips)
        values.add("tvr_pack_clips_total", progress.num_done - last.num_done)
        values.add("tvr_pack_bytes_total", progress.num_bytes - last.num_bytes)
        for reason, count in progress.refused.items():
            values.add("tvr_pack_refused_clips_total", count - last.refused.get(reason, 0), reason)
        for what, count in progress.adjusted.items():
            values.add("tvr_pack_adjusted_clips_total", count - last.adjusted.get(what, 0), what)
        if self._last is not None:
            values.set("tvr_pack_last_clip_timestamp_seconds", time.time())
        self._last = progress
