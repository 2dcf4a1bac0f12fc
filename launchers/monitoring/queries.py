"""PromQL queries of the dashboards, for the runs that the dashboard variable `run` selects.

A run that has just restarted has two series for a short time. `max` or `sum` by run joins them.
"""

from __future__ import annotations

from tvr.launchers.monitoring.grafana import Query

RUN = '{run=~"$run"}'


def latest(metric: str, *labels: str, name: str = "") -> Query:
    """Newest value of a gauge or a recorded metric, by run and `labels`."""
    return Query(f"max by ({_by(labels)}) ({metric}{RUN})", _legend(labels, name))


def per_second(metric: str, *labels: str, name: str = "") -> Query:
    """Increase of a counter per second, by run and `labels`."""
    rate = f"rate({metric}{RUN}[$__rate_interval])"
    return Query(f"sum by ({_by(labels)}) ({rate})", _legend(labels, name))


def per_step(metric: str, *labels: str) -> Query:
    """Mean increase of a counter per optimiser step, by run and `labels`."""
    steps = f"sum by (run) (rate(tvr_train_steps_total{RUN}[$__rate_interval]))"
    return Query(
        f"{per_second(metric, *labels).expr} / on (run) group_left () ({steps} > 0)",
        _legend(labels),
    )


def increase(metric: str, name: str) -> Query:
    """Increase of a counter in the displayed time range, over all starts of the run."""
    return Query(f"sum by (run) (increase({metric}{RUN}[$__range]))", _legend((), name))


def age(metric: str, *labels: str) -> Query:
    """Seconds since a timestamp metric, by run and `labels`."""
    return Query(f"time() - max by ({_by(labels)}) ({metric}{RUN})", _legend(labels))


def _by(labels: tuple[str, ...]) -> str:
    return ", ".join(("run", *labels))


def _legend(labels: tuple[str, ...], name: str = "") -> str:
    """Grafana's legend template."""
    words = [f"{{{{{label}}}}}" for label in ("run", *labels)]
    return " ".join([*words, name] if name else words)
