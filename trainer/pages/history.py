"""The history of a run's metrics, read from its log: a curve over the steps for every series."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tvr.trainer.monitoring.field_metric import FieldMetric, field_metrics, label_value, series_of
from tvr.trainer.monitoring.metrics import SAVE_GAUGES, Series, evaluation_series
from tvr.trainer.monitoring.run_log import RunLog
from tvr.trainer.monitoring.step_record import MonitoredStepRecord, StepRecord

MOST_POINTS = 2000

Value = tuple[Series, int, Any]
"""A series, a step, and the value of the series there."""


@dataclass(frozen=True, slots=True)
class Curve:
    """`y` over the steps `x`, which rise; all values are finite."""

    x: Sequence[int]
    y: Sequence[float]
    mean: Sequence[float] | None = None
    """For a thinned curve: at each point that is left, the mean of all values around it."""


def history(
    log: RunLog,
    config: Mapping[str, Any],
    record_type: type[StepRecord] = MonitoredStepRecord,
) -> dict[Series, Curve]:
    """The curve of every series of which the log has values.

    Args:
        config: The run's settings, as config.json nests them.
        record_type: Declares the metrics of the values in step events.
    """
    points: dict[Series, list[tuple[int, Any]]] = {}
    for series, step, value in _values(log, config, field_metrics(record_type)):
        points.setdefault(series, []).append((step, value))
    return {series: curve for series, found in points.items() if (curve := _curve(found))}


def clock(log: RunLog) -> Curve:
    """Seconds trained so far over the steps; the time between two starts is not counted."""
    times = [(event["step"], event["elapsed_s"]) for event in log.steps]
    return _curve([(0, 0.0), *times]) or Curve([0], [0.0])


def thinned(curves: Sequence[Curve], most: int = MOST_POINTS) -> list[Curve]:
    """The same curves with at most `most` points.

    The highest and the lowest point of each stretch stay, so that no spike is lost. Curves over the
    same steps keep the same points, chosen by their sum.
    """
    assert all(curve.x == curves[0].x for curve in curves), "curves over different steps"
    if not curves or len(curves[0].x) <= most:
        return list(curves)
    values = np.array([curve.y for curve in curves])
    total, last = values.sum(axis=0), values.shape[1] - 1
    starts = np.linspace(0, last + 1, most // 2, dtype=int)[:-1]
    stretches = list(pairwise([*starts.tolist(), last + 1]))
    chosen = {0, last}
    for start, end in stretches:
        chosen |= {start + int(total[start:end].argmin()), start + int(total[start:end].argmax())}
    indices = np.array(sorted(chosen))
    stretch_of = np.searchsorted(starts, indices, side="right") - 1
    means = np.add.reduceat(values, starts, axis=1) / np.diff([*starts, last + 1])
    x = [curves[0].x[index] for index in indices.tolist()]
    return [
        Curve(x, y[indices].tolist(), mean[stretch_of].tolist())
        for y, mean in zip(values, means, strict=True)
    ]


def _curve(points: Iterable[tuple[int, float | None]]) -> Curve | None:
    known = [(step, y) for step, y in points if y is not None and math.isfinite(y)]
    return Curve([step for step, _ in known], [y for _, y in known]) if known else None


def _values(
    log: RunLog, config: Mapping[str, Any], metrics: Mapping[str, FieldMetric]
) -> Iterator[Value]:
    num_frames, temperature = config["data"]["num_frames"], config["loss"]["temperature"]
    shown = {name: found for name, found in metrics.items() if name not in ("step", "epoch")}
    for event in log.steps:
        step = event["step"]
        for name, found in shown.items():
            if not found.is_total:
                for series, value in series_of(found, event.get(name)):
                    yield series, step, value
        yield ("tvr_train_frames_per_second",), step, num_frames * event["samples_per_s"]
        yield ("tvr_train_temperature",), step, temperature
        if event.get("penalty") is not None:
            yield ("tvr_train_negative_weight",), step, config["loss"]["neg_nce_weight"]
    for name, found in shown.items():
        if found.is_total:
            yield from _increase_per_step(log, name, found)
    for event in log.evaluations:
        for series, value in evaluation_series(event):
            yield series, event["step"], value
    for event in log.saves:
        for name, gauge in SAVE_GAUGES.items():
            yield (gauge,), event["step"], event.get(name)
    yield from _checkpoint_age(log)
    yield from _skipped(log)


def _increase_per_step(log: RunLog, name: str, found: FieldMetric) -> Iterator[Value]:
    """Mean increase of counters per step since the last logged step; they restart with the run."""
    before: Mapping[str, float] = {}
    last, resumed = 0, sorted(log.resumed_at)
    for event in log.steps:
        step, totals = event["step"], event.get(name) or {}
        started = resumed[at - 1] if (at := bisect_left(resumed, step)) else 0
        if started >= last:
            before, last = {}, started
        for key, total in totals.items():
            increase = (total - before.get(key, 0)) / (step - last)
            yield (found.name, label_value(key)), step, increase
        before, last = totals, step


def _checkpoint_age(log: RunLog) -> Iterator[Value]:
    """Seconds of training that a failure at each step would cost."""
    published = [0.0, *(event["elapsed_s"] for event in log.saves if "error" not in event)]
    for event in log.steps if len(published) > 1 else ():
        newest = published[bisect_right(published, event["elapsed_s"]) - 1]
        yield ("tvr_checkpoint_timestamp_seconds",), event["step"], event["elapsed_s"] - newest


def _skipped(log: RunLog) -> Iterator[Value]:
    """Bad samples so far, by reason."""
    found = Counter((event["reason"], event["step"]) for event in log.replaced)
    so_far: Counter[str] = Counter()
    for (reason, step), count in sorted(found.items()):
        so_far[reason] += count
        yield ("tvr_data_skipped_samples_total", reason), step, so_far[reason]
