"""Which metrics the dashboard draws, in which order and form; names and meanings are the table's.

A metric that no run has values of gives no panel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from tvr.data_prep.metric import Metric
from tvr.trainer.history import Curve, Series, thinned
from tvr.trainer.metrics import TRAINING_METRICS

# Of a number that is written with these, every digit that can be told apart in a chart is there.
DIGITS = 7


class Form(NamedTuple):
    """How a metric is drawn."""

    metric: str
    apart: str = ""
    """The label whose values have a panel each."""
    stacked: bool = False
    """The series are parts of a whole."""
    per_step: bool = False
    """What a step adds to a counter is drawn, not its value."""
    title: str = ""
    """Where what is drawn has another name than the metric."""


GROUPS: Mapping[str, Sequence[Form]] = {
    "Run overview": (
        Form("tvr_train_loss"),
        Form("tvr_evaluation_recall_ratio", apart="direction"),
        Form("tvr_train_learning_rate"),
        Form("tvr_train_gradient_norm"),
        Form("tvr_train_pairs_per_second"),
        Form("tvr_train_step_seconds"),
        Form("tvr_train_part_seconds_total", stacked=True, per_step=True),
        Form("tvr_train_goodput_ratio"),
        Form("tvr_evaluation_median_rank"),
        Form("tvr_evaluation_mean_rank"),
        Form("tvr_evaluation_binding_accuracy_ratio"),
    ),
    "Data": (
        Form("tvr_data_wait_seconds_total", per_step=True),
        Form("tvr_train_frames_per_second"),
        Form("tvr_data_skipped_samples_total"),
    ),
    "Communication and memory": (
        Form("tvr_host_memory_bytes"),
        Form("tvr_device_memory_bytes"),
    ),
    "Hard-negative mining": (
        Form("tvr_train_hard_negatives_per_row"),
        Form("tvr_train_negative_weight"),
        Form("tvr_train_zero_gradient_positives_ratio"),
        Form("tvr_train_temperature"),
    ),
    "Checkpoints": (
        Form("tvr_checkpoint_seconds"),
        Form("tvr_checkpoint_held_up_seconds"),
        Form("tvr_checkpoint_bytes"),
        Form("tvr_checkpoint_timestamp_seconds", title="Checkpoint age seconds"),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One run's curve of a panel."""

    run: int
    label: str
    x: Sequence[int]
    y: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One chart."""

    id: str
    title: str
    metric: str
    meaning: str
    unit: str
    stacked: bool
    labels: Sequence[str]
    """In the order of the table; what a line is called in the legend."""
    lines: Sequence[Line]


def panels(histories: Sequence[Mapping[Series, Curve]]) -> dict[str, list[Panel]]:
    """The panels of each group that has any, for runs to be laid over one another."""
    table = {metric.name: metric for metric in TRAINING_METRICS}
    drawn = {
        group: [
            panel for form in forms for panel in _of_a_form(form, table[form.metric], histories)
        ]
        for group, forms in GROUPS.items()
    }
    return {group: found for group, found in drawn.items() if found}


def title_of(metric: Metric) -> str:
    """A metric's name for a person."""
    name = metric.name.removeprefix("tvr_").removeprefix("train_")
    words = name.removesuffix("_total").removesuffix("_ratio").replace("_", " ")
    return words[0].upper() + words[1:]


def _of_a_form(
    form: Form, metric: Metric, histories: Sequence[Mapping[Series, Curve]]
) -> list[Panel]:
    values = metric.labels.get(form.apart, ("",))
    # Parts of different runs cannot be stacked on one another.
    sets = [[run] for run in range(len(histories))] if form.stacked else [range(len(histories))]
    made = [_panel(form, metric, value, runs, histories) for value, runs in product(values, sets)]
    return [panel for panel in made if panel.lines]


def _panel(
    form: Form,
    metric: Metric,
    value: str,
    runs: Sequence[int],
    histories: Sequence[Mapping[Series, Curve]],
) -> Panel:
    named = {
        (metric.name, *labels): _label(metric, labels, form.apart)
        for labels in metric.series
        if not value or value in labels
    }
    lines = []
    for run in runs:
        curves = {name: histories[run][name] for name in named if name in histories[run]}
        for name, curve in zip(curves, _thinned(curves.values(), form.stacked), strict=True):
            y = [float(f"{y:.{DIGITS}g}") for y in curve.y]
            lines.append(Line(run=run, label=named[name], x=curve.x, y=y))
    id = "-".join(
        [metric.name, *([value] if value else []), *map(str, runs if form.stacked else [])]
    )
    title = (form.title or title_of(metric)) + (" per step" if form.per_step else "")
    return Panel(
        id=id,
        title=f"{title}, {_words(value)}" if value else title,
        metric=metric.name,
        meaning=metric.meaning,
        unit=metric.unit,
        stacked=form.stacked,
        labels=list(dict.fromkeys(line.label for line in lines)),
        lines=lines,
    )


def _thinned(curves: Any, together: bool) -> list[Curve]:
    curves = list(curves)
    if together and curves:
        return thinned(curves)
    return [thin for curve in curves for thin in thinned([curve])]


def _label(metric: Metric, labels: Sequence[str], apart: str) -> str:
    """What tells a series from the panel's others: the values of its labels."""
    told = [
        f"{name} = {value}" if value.isdigit() else _words(value)
        for (name, values), value in zip(metric.labels.items(), labels, strict=True)
        if name != apart and len(values) > 1
    ]
    return ", ".join(told)


def _words(value: str) -> str:
    return value.replace("_", " ")
