"""What a run's log says of the metrics: the values of their series over the steps."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from tvr.trainer.monitoring.metrics import CUTS, DIRECTIONS
from tvr.trainer.monitoring.monitor import GAUGES
from tvr.trainer.monitoring.run_log import RunLog

MOST_POINTS = 2000

Series: TypeAlias = tuple[str, ...]
"""A metric of the table, and the values of its labels."""

# Beside what a gauge shows: counters of seconds, of which a step's own part is drawn.
_OF_A_STEP: dict[str, Series] = {
    **{key: series for key, series in GAUGES.items() if key not in ("step", "epoch")},
    "step_s": ("tvr_train_step_seconds",),
    "data_wait_s": ("tvr_data_wait_seconds_total",),
    "straggler_gap_s": ("tvr_train_straggler_gap_seconds_total",),
    "host_memory_bytes": ("tvr_host_memory_bytes",),
}
# Of these an event has several by name, which is the metric's label.
_NAMED = {
    "parts_s": "tvr_train_part_seconds_total",
    "device_memory_bytes": "tvr_device_memory_bytes",
}
# The same, counted since the start of the job.
_COUNTED = {
    "received_bytes": "tvr_train_received_bytes_total",
    "reads": "tvr_data_reads_total",
}
_OF_A_SAVE: dict[str, Series] = {
    "seconds": ("tvr_checkpoint_seconds",),
    "held_up_s": ("tvr_checkpoint_held_up_seconds",),
    "num_bytes": ("tvr_checkpoint_bytes",),
}


@dataclass(frozen=True, slots=True)
class Curve:
    """`y` over the steps `x`, which rise; all finite."""

    x: Sequence[int]
    y: Sequence[float]
    mean: Sequence[float] | None = None
    """Of a curve that was thinned: the mean of all its values around each that is left."""


def history(log: RunLog, config: Mapping[str, Any]) -> dict[Series, Curve]:
    """Every series that the log of a run with these settings holds values of."""
    points: dict[Series, list[tuple[int, Any]]] = {}
    for series, step, value in _values(log, config):
        points.setdefault(series, []).append((step, value))
    return {series: curve for series, found in points.items() if (curve := _curve(found))}


def clock(log: RunLog) -> Curve:
    """Seconds trained so far, restarts left out, over the steps."""
    times = [(event["step"], event["elapsed_s"]) for event in log.steps]
    return _curve([(0, 0.0), *times]) or Curve([0], [0.0])


def thinned(curves: Sequence[Curve], most: int = MOST_POINTS) -> list[Curve]:
    """The same curves with at most `most` points, of which the highest and lowest of each stretch
    stay, so that no spike is lost. Curves over the same steps keep the same ones, by their sum."""
    assert all(curve.x == curves[0].x for curve in curves), "curves over different steps"
    if not curves or len(curves[0].x) <= most:
        return list(curves)
    values = np.array([curve.y for curve in curves])
    total, last = values.sum(axis=0), values.shape[1] - 1
    starts = np.linspace(0, last + 1, most // 2, dtype=int)[:-1]
    stretches = list(pairwise([*starts.tolist(), last + 1]))
    kept = {0, last}
    for start, end in stretches:
        kept |= {start + int(total[start:end].argmin()), start + int(total[start:end].argmax())}
    places = np.array(sorted(kept))
    of = np.searchsorted(starts, places, side="right") - 1
    means = np.add.reduceat(values, starts, axis=1) / np.diff([*starts, last + 1])
    x = [curves[0].x[place] for place in places.tolist()]
    return [
        Curve(x, y[places].tolist(), mean[of].tolist())
        for y, mean in zip(values, means, strict=True)
    ]


def _curve(points: Iterable[tuple[int, float | None]]) -> Curve | None:
    known = [(step, y) for step, y in points if y is not None and math.isfinite(y)]
    return Curve([step for step, _ in known], [y for _, y in known]) if known else None


def _values(log: RunLog, config: Mapping[str, Any]) -> Iterator[tuple[Series, int, Any]]:
    num_frames, temperature = config["data"]["num_frames"], config["loss"]["temperature"]
    for event in log.steps:
        yield from _picked(event, _OF_A_STEP)
        step = event["step"]
        yield ("tvr_train_frames_per_second",), step, num_frames * event["samples_per_s"]
        yield ("tvr_train_temperature",), step, temperature
        for key, metric in _NAMED.items():
            for name, value in event.get(key, {}).items():
                yield (metric, name.replace(" ", "_")), step, value
        if event.get("penalty") is not None:
            yield ("tvr_train_negative_weight",), step, config["loss"]["neg_nce_weight"]
    for key, metric in _COUNTED.items():
        yield from _of_each_step(log, key, metric)
    for event in log.evaluations:
        yield from _of_an_evaluation(event)
    for event in log.saves:
        yield from _picked(event, _OF_A_SAVE)
    yield from _checkpoint_age(log)
    yield from _skipped(log)


def _picked(
    event: Mapping[str, Any], names: Mapping[str, Series]
) -> Iterator[tuple[Series, int, Any]]:
    for key, series in names.items():
        yield series, event["step"], event.get(key)


def _of_each_step(log: RunLog, key: str, metric: str) -> Iterator[tuple[Series, int, Any]]:
    """What a step added to counters, in the mean over the steps since the last one that was
    logged. They begin anew where the run was resumed."""
    before: Mapping[str, float] = {}
    last, resumed = 0, sorted(log.resumed_at)
    for event in log.steps:
        step, counts = event["step"], event.get(key) or {}
        started = resumed[at - 1] if (at := bisect_left(resumed, step)) else 0
        if started >= last:
            before, last = {}, started
        for name, count in counts.items():
            yield (metric, name), step, (count - before.get(name, 0)) / (step - last)
        before, last = counts, step


def _of_an_evaluation(event: Mapping[str, Any]) -> Iterator[tuple[Series, int, Any]]:
    step = event["step"]
    for direction in DIRECTIONS:
        way, labels = event[direction], ("test", direction)
        for k in CUTS:
            yield ("tvr_evaluation_recall_ratio", *labels, k), step, way[f"recall_at_{k}"] / 100
        yield ("tvr_evaluation_median_rank", *labels), step, way["median_rank"]
        yield ("tvr_evaluation_mean_rank", *labels), step, way["mean_rank"]
    if event.get("binding_accuracy") is not None:
        yield ("tvr_evaluation_binding_accuracy_ratio",), step, event["binding_accuracy"] / 100


def _checkpoint_age(log: RunLog) -> Iterator[tuple[Series, int, Any]]:
    """Seconds that would be trained again if the run broke now."""
    published = [0.0, *(event["elapsed_s"] for event in log.saves if "error" not in event)]
    for event in log.steps if len(published) > 1 else ():
        newest = published[bisect_right(published, event["elapsed_s"]) - 1]
        yield ("tvr_checkpoint_timestamp_seconds",), event["step"], event["elapsed_s"] - newest


def _skipped(log: RunLog) -> Iterator[tuple[Series, int, Any]]:
    """Bad samples so far, by reason."""
    met = Counter((event["reason"], event["step"]) for event in log.replaced)
    so_far: Counter[str] = Counter()
    for (reason, step), count in sorted(met.items()):
        so_far[reason] += count
        yield ("tvr_data_skipped_samples_total", reason), step, so_far[reason]
