"""Tables of metrics, their values, and their Prometheus text format.

A table fixes every label value, so all series are known in advance. Their values are stored in one
array with a slot per series, which the processes of a node can share. Setting a value is one
assignment; names are looked up and text is rendered only by readers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family

MetricArray = np.ndarray
"""(series of a table,) float64; NaN = no value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A metric; `name` ends with the unit, that of a counter with `_total`."""

    name: str
    kind: Literal["gauge", "counter"]
    unit: str
    """Base unit; empty for a plain number."""
    meaning: str
    per: Literal["run", "node", "rank"] = "run"
    """run: reported by rank 0 only; node: sum over a node's ranks; rank: one series for each rank,
    with the label `rank`."""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """All values of each label, without `rank`; no value for a label whose values depend on the
    run, see `with_labels`."""

    @property
    def label_names(self) -> tuple[str, ...]:
        return (*self.labels, "rank") if self.per == "rank" else tuple(self.labels)

    @property
    def series(self) -> list[tuple[str, ...]]:
        """All combinations of label values."""
        return list(product(*self.labels.values()))


def with_labels(metrics: Sequence[Metric], values: Mapping[str, tuple[str, ...]]) -> list[Metric]:
    """Returns the metrics with the values of this run for labels that have none."""
    return [
        replace(
            metric,
            labels={name: known or values.get(name, ()) for name, known in metric.labels.items()},
        )
        for metric in metrics
    ]


class MetricTable:
    """Metrics, and the slot of each series in a MetricArray."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.metrics = tuple(metrics)
        names = [(metric.name, *labels) for metric in metrics for labels in metric.series]
        self.slots = {name: slot for slot, name in enumerate(names)}
        assert len(self.slots) == len(names), "two metrics have the same name"
        self._counters = [
            self.slots[metric.name, *labels]
            for metric in metrics
            if metric.kind == "counter"
            for labels in metric.series
        ]

    def clear(self, numbers: MetricArray) -> None:
        """Sets counters to 0 and gauges to no value."""
        numbers[:] = np.nan
        numbers[self._counters] = 0

    def text(self, ranks: Mapping[int, MetricArray]) -> bytes:
        """Renders the values of a node's ranks in Prometheus text format."""
        registry = CollectorRegistry()
        # A snapshot: training continues while the text is rendered.
        now = {rank: numbers.copy() for rank, numbers in ranks.items()}
        registry.register(_Collected(self, now))
        return generate_latest(registry)


class MetricValues:
    """Write access to one rank's values."""

    def __init__(self, table: MetricTable, numbers: MetricArray) -> None:
        self._slots = table.slots
        self._numbers = numbers
        table.clear(numbers)

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """Sets a metric; None means no value."""
        self._numbers[self._slots[name, *labels]] = np.nan if value is None else value

    def add(self, name: str, value: float, *labels: str) -> None:
        """Adds to a metric."""
        self._numbers[self._slots[name, *labels]] += value

    def count(self, name: str, total: float, *labels: str) -> None:
        """Sets a counter to a total that is counted elsewhere."""
        self._numbers[self._slots[name, *labels]] = total

    def get(self, name: str, *labels: str) -> float:
        """Returns the value of a metric; NaN means no value."""
        return float(self._numbers[self._slots[name, *labels]])


@dataclass(frozen=True, slots=True, eq=False)
class _Collected:
    """Collector that a registry calls for metric families."""

    table: MetricTable
    ranks: Mapping[int, MetricArray]

    def collect(self) -> Iterator[Family]:
        for metric in self.table.metrics:
            make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = make(metric.name, metric.meaning, labels=metric.label_names)
            for labels, value in self._samples(metric):
                family.add_metric(labels, value)
            if family.samples:
                yield family

    def _samples(self, metric: Metric) -> Iterator[tuple[tuple[str, ...], float]]:
        for labels in metric.series:
            slot = self.table.slots[metric.name, *labels]
            found = {rank: float(numbers[slot]) for rank, numbers in self.ranks.items()}
            known = {rank: value for rank, value in found.items() if not np.isnan(value)}
            if metric.per == "rank":
                yield from (((*labels, str(rank)), value) for rank, value in known.items())
            elif metric.per == "run" and 0 in known:
                yield labels, known[0]
            elif metric.per == "node" and known:
                yield labels, sum(known.values())
