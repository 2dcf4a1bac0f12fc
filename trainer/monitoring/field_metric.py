"""Metrics that fields of a record declare, with their table rows, series and panels.

The fields of `step_record.StepRecord` are declared this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from tvr.data_prep.exporter.metrics_table import Metric, MetricValues
from tvr.trainer.config import LossConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldMetric:
    """The metric of a field, and how the pages draw it.

    Several fields may share a metric and differ in the value of its label; the first of them has
    the help. A field with a mapping has a series for each key.
    """

    name: str
    help: str = ""
    unit: str = ""
    kind: Literal["gauge", "counter"] = "gauge"
    """The field of a counter holds what the step added, unless `is_total`."""
    per: Literal["run", "node", "rank"] = "run"
    label: str = ""
    """Name of the label of the metric's series; empty: the metric has a single series."""
    label_values: tuple[str, ...] = ()
    """The label's value for this field, or its values for the keys of a mapping; none if the keys
    depend on the run."""
    is_total: bool = False
    """The field of a counter holds the total since the start of the job."""
    panel: str = ""
    """Group of panels that shows the metric; empty: none of its own."""
    beside: str = ""
    """Name of another metric that is drawn in the same panel."""
    stacked: bool = False
    """The series are parts of a whole."""
    points: bool = False
    """Values are drawn as points, since a line between two of them means nothing."""
    is_loss_term: bool = False
    """The field is a term or a statistic of the loss, summed over the ranks' shares."""
    applies_to: Callable[[LossConfig], bool] | None = None
    """True if these settings compute the term; a term that is not computed is None."""


def metric(name: str, help: str = "", **options: Any) -> dict[str, FieldMetric]:
    """Metadata of a field that has a metric; see `FieldMetric` for the options."""
    return {"metric": FieldMetric(name=name, help=help, **options)}


def loss_term(
    name: str, help: str = "", *, term: str = "", **options: Any
) -> dict[str, FieldMetric]:
    """Metadata of a field with a term or a statistic of the loss over the global batch."""
    label = {"label": "term", "label_values": (term,)} if term else {}
    return metric(name, help, is_loss_term=True, **label, **options)


def label_value(key: str) -> str:
    """The value of a label for a key of a field's mapping."""
    return key.replace(" ", "_")


def field_metrics(record_type: type[Any]) -> dict[str, FieldMetric]:
    """The metric of every field that declares one, by the field's name."""
    return {
        entry.name: entry.metadata["metric"]
        for entry in fields(record_type)
        if "metric" in entry.metadata
    }


def table_rows(record_type: type[Any]) -> tuple[Metric, ...]:
    """The rows of the metrics table that a record's fields declare."""
    by_name: dict[str, list[FieldMetric]] = {}
    for found in field_metrics(record_type).values():
        by_name.setdefault(found.name, []).append(found)
    return tuple(_table_row(shared) for shared in by_name.values())


def _table_row(shared: Sequence[FieldMetric]) -> Metric:
    first = shared[0]
    values = tuple(value for entry in shared for value in entry.label_values)
    return Metric(
        name=first.name,
        kind=first.kind,
        unit=first.unit,
        meaning=first.help,
        per=first.per,
        labels={first.label: values} if first.label else {},
    )


def series_of(found: FieldMetric, value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The series that the value of a field is for, each with its own value.

    A series is the metric's name, followed by the value of its label if it has one.
    """
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield (found.name, label_value(key)), entry
    else:
        yield (found.name, *found.label_values), value


def export_field(found: FieldMetric, value: Any, values: MetricValues) -> None:
    """Writes the value of a field to its Prometheus series."""
    for (name, *labels), entry in series_of(found, value):
        if found.kind == "gauge":
            values.set(name, entry, *labels)
        elif found.is_total:
            values.count(name, entry, *labels)
        elif entry is not None:
            values.add(name, entry, *labels)
