"""The panels of the pages: which metrics they draw, and how.

A step's values declare their panels in `step_record`; the panels of other metrics stand here. Names
and meanings come from the metrics table. A metric of which no run has values gets no panel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from tvr.data_prep.exporter.metrics_table import Metric, with_labels
from tvr.trainer.monitoring.field_metric import field_metrics, table_rows
from tvr.trainer.monitoring.loss_record import MINING, TRAINING
from tvr.trainer.monitoring.metrics import RUN_METRICS, Series
from tvr.trainer.monitoring.step_record import (
    COMMUNICATION,
    DATA,
    DATA_SET,
    SPEED,
    MonitoredStepRecord,
    StepRecord,
)
from tvr.trainer.pages.history import Curve, thinned

# A chart cannot show more digits.
DIGITS = 7
GROUPS = (TRAINING, "Evaluation", SPEED, DATA, COMMUNICATION, MINING, "Checkpoints")
"""In the order of the page."""


class PanelSpec(NamedTuple):
    """Metric of a panel, and the form of its chart."""

    metric: str
    split_by: str = ""
    """Label that splits the metric: each of its values gets a panel."""
    beside: str = ""
    """Another metric of the same kind, drawn in the same panel."""
    stacked: bool = False
    """The series are parts of a whole."""
    points: bool = False
    """Values are drawn as points, since a line between two of them means nothing."""
    per_step: bool = False
    """Draws what a step adds to a counter, not the counter."""
    title: str = ""
    """Title, where it differs from the metric's name."""


_OTHER_PANELS: Mapping[str, Sequence[PanelSpec]] = {
    "Evaluation": (
        PanelSpec("tvr_evaluation_recall_ratio", split_by="direction"),
        PanelSpec("tvr_evaluation_median_rank"),
        PanelSpec("tvr_evaluation_mean_rank"),
        PanelSpec("tvr_evaluation_binding_accuracy_ratio"),
    ),
    DATA: (
        PanelSpec("tvr_train_frames_per_second"),
        PanelSpec("tvr_data_skipped_samples_total"),
    ),
    MINING: (
        PanelSpec("tvr_train_negative_weight"),
        PanelSpec("tvr_train_temperature"),
    ),
    "Checkpoints": (
        PanelSpec("tvr_checkpoint_seconds"),
        PanelSpec("tvr_checkpoint_held_up_seconds"),
        PanelSpec("tvr_checkpoint_bytes"),
        PanelSpec("tvr_checkpoint_timestamp_seconds", title="Checkpoint age seconds"),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One run's curve in a panel."""

    run: int
    label: str
    x: Sequence[int]
    y: Sequence[float]
    mean: Sequence[float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One chart."""

    id: str
    title: str
    metric: str
    meaning: str
    unit: str
    stacked: bool
    points: bool
    labels: Sequence[str]
    """Names of the lines in the legend, in the order of the table."""
    lines: Sequence[Line]


def panel_specs(
    record_type: type[StepRecord] = MonitoredStepRecord,
) -> dict[str, list[PanelSpec]]:
    """The panels of each group, whether or not a run has values for them."""
    groups: dict[str, list[PanelSpec]] = {group: [] for group in GROUPS}
    for found in field_metrics(record_type).values():
        if found.panel:
            spec = PanelSpec(
                found.name,
                beside=found.beside,
                stacked=found.stacked,
                points=found.points,
                per_step=found.kind == "counter",
            )
            groups[found.panel].append(spec)
    for group, specs in _OTHER_PANELS.items():
        groups[group] += specs
    return groups


def panels(
    histories: Sequence[Mapping[Series, Curve]],
    record_type: type[StepRecord] = MonitoredStepRecord,
) -> dict[str, list[Panel]]:
    """The panels of each group that has any, with the curves of all runs laid over one another."""
    metrics = [*table_rows(record_type), *RUN_METRICS]
    metrics = with_labels(metrics, {DATA_SET: _data_sets(metrics, histories)})
    table = {metric.name: metric for metric in metrics}
    drawn = {
        group: [panel for spec in specs for panel in _panels_of(spec, table, histories)]
        for group, specs in panel_specs(record_type).items()
    }
    return {group: found for group, found in drawn.items() if found}


def _data_sets(
    metrics: Sequence[Metric], histories: Sequence[Mapping[Series, Curve]]
) -> tuple[str, ...]:
    """The training sets of the runs, which name series of their own."""
    by_set = {metric.name for metric in metrics if tuple(metric.labels) == (DATA_SET,)}
    found = {series[1] for one in histories for series in one if series[0] in by_set}
    return tuple(sorted(found))


def title_of(metric: Metric) -> str:
    """A metric's name in words."""
    name = metric.name.removeprefix("tvr_").removeprefix("train_")
    words = _words(name.removesuffix("_total").removesuffix("_ratio"))
    return words[0].upper() + words[1:]


def _panels_of(
    spec: PanelSpec, table: Mapping[str, Metric], histories: Sequence[Mapping[Series, Curve]]
) -> list[Panel]:
    metrics = [table[name] for name in (spec.metric, spec.beside) if name]
    values = metrics[0].labels.get(spec.split_by, ("",))
    all_runs = range(len(histories))
    # Parts of different runs cannot be stacked on one another.
    run_sets = [[run] for run in all_runs] if spec.stacked else [all_runs]
    made = [
        _panel(spec, metrics, value, runs, histories) for value, runs in product(values, run_sets)
    ]
    return [panel for panel in made if panel.lines]


def _panel(
    spec: PanelSpec,
    metrics: Sequence[Metric],
    value: str,
    runs: Sequence[int],
    histories: Sequence[Mapping[Series, Curve]],
) -> Panel:
    """The panel of the series whose label `spec.split_by`, if it is given, has the value."""
    titles = [spec.title] if spec.title else [title_of(metric) for metric in metrics]
    labels = _labels(spec, metrics, value)
    curves = {
        (run, label): histories[run][series]
        for run in runs
        for series, label in labels.items()
        if series in histories[run]
    }
    lines = [
        Line(
            run=run,
            label=label,
            x=curve.x,
            y=_rounded(curve.y),
            mean=None if curve.mean is None or spec.stacked else _rounded(curve.mean),
        )
        for (run, label), curve in zip(curves, _drawn(spec, curves.values()), strict=True)
    ]
    parts = [spec.metric, value, *(map(str, runs) if spec.stacked else ())]
    return Panel(
        id="-".join(part for part in parts if part),
        title=" and ".join([titles[0], *(title.lower() for title in titles[1:])])
        + (" per step" if spec.per_step else "")
        + (f", {_words(value)}" if value else ""),
        metric=spec.metric,
        meaning=" ".join(metric.meaning for metric in metrics)
        # Rank 0 writes the log.
        + ("" if metrics[0].per == "run" else " Only rank 0's values are shown."),
        unit=metrics[0].unit,
        stacked=spec.stacked,
        points=spec.points,
        labels=[label for label in labels.values() if any(line.label == label for line in lines)],
        lines=lines,
    )


def _labels(spec: PanelSpec, metrics: Sequence[Metric], value: str) -> dict[Series, str]:
    """The name of each series of a panel, in the order of the table."""
    if spec.beside:
        return {(metric.name,): title_of(metric).lower() for metric in metrics}
    (metric,) = metrics
    names = [
        name for name, values in metric.labels.items() if name != spec.split_by and len(values) > 1
    ]
    labels = {}
    for series in metric.series:
        by_name = dict(zip(metric.labels, series, strict=True))
        if by_name.get(spec.split_by, "") == value:
            labels[metric.name, *series] = ", ".join(
                _label_text(name, by_name[name]) for name in names
            )
    return labels


def _drawn(spec: PanelSpec, curves: Iterable[Curve]) -> list[Curve]:
    """The curves with no more points than can be seen; stacked curves share their steps."""
    if not spec.stacked:
        return [thin for curve in curves for thin in thinned([curve])]
    known = [dict(zip(curve.x, curve.y, strict=True)) for curve in curves]
    steps = sorted({step for one in known for step in one})
    # A step without a part spent nothing on it.
    return thinned([Curve(steps, [one.get(step, 0.0) for step in steps]) for one in known])


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]


def _label_text(name: str, value: str) -> str:
    return f"{name} = {value}" if value.isdigit() else _words(value)


def _words(value: str) -> str:
    return value.replace("_", " ")
