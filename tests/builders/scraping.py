"""Metrics as Prometheus scrapes them, by name and label values."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from tvr.trainer.monitoring.metrics import TRAINING_METRICS
from tvr.trainer.monitoring.step_record import DATA_SET, STEP_METRICS

Samples = dict[tuple[str, ...], float]
"""Value of each series: its metric's name, then its label values in the order of their names."""

RUN_GAUGES = {
    name: (found.name, *found.label_values)
    for name, found in STEP_METRICS.items()
    if found.kind == "gauge"
    and found.per == "run"
    and bool(found.label) == bool(found.label_values)
}
"""Series of the values of a step that rank 0 exports as gauges, by their name in the log; without
those by training set, which a run with one set does not have."""

ABSENT = {
    "tvr_train_zero_gradient_positives_ratio",  # of NegNCE's reference mode
    "tvr_train_dropped_negatives_per_row",  # of loss.drop_above
    "tvr_device_memory_bytes",
    *(metric.name for metric in TRAINING_METRICS if DATA_SET in metric.labels),
}
"""Metrics that a default run on a CPU does not have."""


def scrape(url: str) -> str:
    """The text that an endpoint answers with."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        return answer.read().decode()


def parse_samples(text: str) -> Samples:
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
