"""Queries of the dashboards, each of the runs that their variable `run` selects: one or several.

A value of a run is the largest of its series: one that was started again has two for a moment.
"""

from __future__ import annotations

from tvr.launchers.monitoring.grafana import Query

RUN = '{run=~"$run"}'


def latest(metric: str, *labels: str, name: str = "") -> Query:
    """A gauge, or a recorded value, for each run and value of `labels`."""
    return Query(f"max by ({_listed(labels)}) ({metric}{RUN})", _legend(labels, name))


def per_second(metric: str, *labels: str, name: str = "") -> Query:
    """How fast a counter grows."""
    rate = f"rate({metric}{RUN}[$__rate_interval])"
    return Query(f"sum by ({_listed(labels)}) ({rate})", _legend(labels, name))


def per_step(metric: str, *labels: str) -> Query:
    """How much a counter grows in a step, whether or not the steps are alike."""
    steps = f"sum by (run) (rate(tvr_train_steps_total{RUN}[$__rate_interval]))"
    return Query(
        f"{per_second(metric, *labels).expr} / on (run) group_left () ({steps} > 0)",
        _legend(labels),
    )


def so_far(metric: str, name: str) -> Query:
    """How much a counter grew within the time shown, over all starts of the run."""
    return Query(f"sum by (run) (increase({metric}{RUN}[$__range]))", _legend((), name))


def since(metric: str, *labels: str) -> Query:
    """Seconds since a timestamp."""
    return Query(f"time() - max by ({_listed(labels)}) ({metric}{RUN})", _legend(labels))


def _listed(labels: tuple[str, ...]) -> str:
    return ", ".join(("run", *labels))


def _legend(labels: tuple[str, ...], name: str = "") -> str:
    """As Grafana fills it in."""
    words = [f"{{{{{label}}}}}" for label in ("run", *labels)]
    return " ".join([*words, name] if name else words)


RECALL = latest("tvr_evaluation_recall_ratio", "split", "direction", "k")
