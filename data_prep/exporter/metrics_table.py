"""A metric as a row of a table, the values of such a table, and their text for Prometheus.

What a label can say stands in the table, so that the series are known beforehand: their values lie
in a line of numbers, one place each, which the processes of a node can share. Setting one is an
assignment; names and text are for who reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family

MetricArray = np.ndarray
"""(series of a table,) float64; NaN where there is no value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row; `name` ends with the unit, a counter's with `_total`."""

    name: str
    kind: Literal["gauge", "counter"]
    unit: str
    """In base units; empty for a plain number."""
    meaning: str
    per: Literal["run", "node", "rank"] = "run"
    """run: told by rank 0 alone; node: the sum over a node's ranks; rank: a series for each rank,
    with the label `rank`."""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Every value that each label can have; without `rank`."""

    @property
    def label_names(self) -> tuple[str, ...]:
        return (*self.labels, "rank") if self.per == "rank" else tuple(self.labels)

    @property
    def series(self) -> list[tuple[str, ...]]:
        """The combinations of label values."""
        return list(product(*self.labels.values()))


class MetricTable:
    """Metrics, and the place of each of their series in a line of numbers."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.metrics = tuple(metrics)
        names = [(metric.name, *labels) for metric in metrics for labels in metric.series]
        self.slots = {name: place for place, name in enumerate(names)}
        assert len(self.slots) == len(names), "two metrics of one name"
        self._counters = [
            self.slots[metric.name, *labels]
            for metric in metrics
            if metric.kind == "counter"
            for labels in metric.series
        ]

    def clear(self, numbers: MetricArray) -> None:
        """Counters at 0, gauges without value."""
        numbers[:] = np.nan
        numbers[self._counters] = 0

    def text(self, ranks: Mapping[int, MetricArray]) -> bytes:
        """The values of a node's ranks in the text format."""
        registry = CollectorRegistry()
        # Of one moment: steps go on while the text is made.
        now = {rank: numbers.copy() for rank, numbers in ranks.items()}
        registry.register(_Collected(self, now))
        return generate_latest(registry)


class MetricValues:
    """One rank's values, for the one who writes them."""

    def __init__(self, table: MetricTable, numbers: MetricArray) -> None:
        self._slots = table.slots
        self._numbers = numbers
        table.clear(numbers)

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """None: there is no value."""
        self._numbers[self._slots[name, *labels]] = np.nan if value is None else value

    def add(self, name: str, value: float, *labels: str) -> None:
        self._numbers[self._slots[name, *labels]] += value

    def count(self, name: str, total: float, *labels: str) -> None:
        """A counter that is kept elsewhere."""
        self._numbers[self._slots[name, *labels]] = total

    def get(self, name: str, *labels: str) -> float:
        return float(self._numbers[self._slots[name, *labels]])


@dataclass(frozen=True, slots=True, eq=False)
class _Collected:
    """What a registry asks for families."""

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
            place = self.table.slots[metric.name, *labels]
            found = {rank: float(numbers[place]) for rank, numbers in self.ranks.items()}
            known = {rank: value for rank, value in found.items() if not np.isnan(value)}
            if metric.per == "rank":
                yield from (((*labels, str(rank)), value) for rank, value in known.items())
            elif metric.per == "run" and 0 in known:
                yield labels, known[0]
            elif metric.per == "node" and known:
                yield labels, sum(known.values())
