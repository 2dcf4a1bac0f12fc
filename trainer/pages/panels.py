"""Which metrics the dashboard draws, in which order and form; names and meanings are the table's.

A metric that no run has values of gives no panel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from tvr.data_prep.exporter.metrics_table import Metric
from tvr.trainer.monitoring.metrics import TRAINING_METRICS
from tvr.trainer.pages.history import Curve, Series, thinned

# More could not be told apart in a chart.
DIGITS = 7
_TABLE = {metric.name: metric for metric in TRAINING_METRICS}


class Form(NamedTuple):
    """How a metric is drawn."""

    metric: str
    apart: str = ""
    """The label whose values have a panel each."""
    beside: str = ""
    """Another metric of the same kind, to be seen in one chart with it."""
    stacked: bool = False
    """The series are parts of a whole."""
    points: bool = False
    """What lies between two values means nothing."""
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
        Form("tvr_train_model_flops_per_second"),
        Form("tvr_train_mfu_ratio"),
        Form("tvr_evaluation_median_rank"),
        Form("tvr_evaluation_mean_rank"),
        Form("tvr_evaluation_binding_accuracy_ratio"),
    ),
    "Data": (
        Form("tvr_data_wait_seconds_total", per_step=True),
        Form("tvr_train_frames_per_second"),
        Form("tvr_data_skipped_samples_total"),
        Form("tvr_data_quarantined_samples"),
        Form("tvr_data_reads_total", stacked=True, per_step=True),
    ),
    "Communication and memory": (
        Form("tvr_train_received_bytes_total", stacked=True, per_step=True),
        Form("tvr_train_straggler_gap_seconds_total", per_step=True),
        Form("tvr_train_slowest_rank", points=True),
        Form("tvr_host_memory_bytes"),
        Form("tvr_device_memory_bytes"),
    ),
    "Hard-negative mining": (
        Form("tvr_train_hard_negatives_per_row"),
        Form("tvr_train_negative_weight"),
        Form("tvr_train_zero_gradient_positives_ratio"),
        Form("tvr_train_temperature"),
        Form("tvr_train_positive_similarity", beside="tvr_train_hardest_negative_similarity"),
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
    """In the order of the table; what a line is called in the legend."""
    lines: Sequence[Line]


def panels(histories: Sequence[Mapping[Series, Curve]]) -> dict[str, list[Panel]]:
    """The panels of each group that has any, for runs to be laid over one another."""
    drawn = {
        group: [panel for form in forms for panel in _of_a_form(form, histories)]
        for group, forms in GROUPS.items()
    }
    return {group: found for group, found in drawn.items() if found}


def title_of(metric: Metric) -> str:
    """A metric's name for a person."""
    name = metric.name.removeprefix("tvr_").removeprefix("train_")
    words = _words(name.removesuffix("_total").removesuffix("_ratio"))
    return words[0].upper() + words[1:]


def _of_a_form(form: Form, histories: Sequence[Mapping[Series, Curve]]) -> list[Panel]:
    values = _TABLE[form.metric].labels.get(form.apart, ("",))
    everyone = range(len(histories))
    # Parts of different runs cannot be stacked on one another.
    sets = [[run] for run in everyone] if form.stacked else [everyone]
    made = [_panel(form, value, runs, histories) for value, runs in product(values, sets)]
    return [panel for panel in made if panel.lines]


def _panel(
    form: Form, value: str, runs: Sequence[int], histories: Sequence[Mapping[Series, Curve]]
) -> Panel:
    """The panel of the series in which the label `form.apart` has the value, if it is given."""
    metrics = [_TABLE[name] for name in (form.metric, form.beside) if name]
    titles = [form.title] if form.title else [title_of(metric) for metric in metrics]
    labels = _labels(form, metrics, value)
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
            y=_short(curve.y),
            mean=None if curve.mean is None or form.stacked else _short(curve.mean),
        )
        for (run, label), curve in zip(curves, _drawn(form, curves.values()), strict=True)
    ]
    of = [form.metric, value, *(map(str, runs) if form.stacked else ())]
    return Panel(
        id="-".join(part for part in of if part),
        title=" and ".join([titles[0], *(title.lower() for title in titles[1:])])
        + (" per step" if form.per_step else "")
        + (f", {_words(value)}" if value else ""),
        metric=form.metric,
        meaning=" ".join(metric.meaning for metric in metrics)
        # The log is written by that one.
        + ("" if metrics[0].per == "run" else " Here: of rank 0 alone."),
        unit=metrics[0].unit,
        stacked=form.stacked,
        points=form.points,
        labels=[label for label in labels.values() if any(line.label == label for line in lines)],
        lines=lines,
    )


def _labels(form: Form, metrics: Sequence[Metric], value: str) -> dict[Series, str]:
    """What tells a panel's series from one another, in the order of the table."""
    if form.beside:
        return {(metric.name,): title_of(metric).lower() for metric in metrics}
    (metric,) = metrics
    names = [name for name, said in metric.labels.items() if name != form.apart and len(said) > 1]
    labels = {}
    for series in metric.series:
        by_name = dict(zip(metric.labels, series, strict=True))
        if by_name.get(form.apart, "") == value:
            labels[metric.name, *series] = ", ".join(_told(name, by_name[name]) for name in names)
    return labels


def _drawn(form: Form, curves: Iterable[Curve]) -> list[Curve]:
    """With no more points than can be seen; stacked ones over the same steps."""
    if not form.stacked:
        return [thin for curve in curves for thin in thinned([curve])]
    known = [dict(zip(curve.x, curve.y, strict=True)) for curve in curves]
    steps = sorted({step for one in known for step in one})
    # A part that a step did not have took nothing of it.
    return thinned([Curve(steps, [one.get(step, 0.0) for step in steps]) for one in known])


def _short(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]


def _told(name: str, value: str) -> str:
    return f"{name} = {value}" if value.isdigit() else _words(value)


def _words(value: str) -> str:
    return value.replace("_", " ")
