"""Renders dashboards as Grafana's JSON, in pure functions."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

SCHEMA_VERSION = 41
COLUMNS = 24
HEIGHTS = {"stat": 4, "timeseries": 8, "table": 8}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


class Query(NamedTuple):
    expr: str
    """PromQL with Grafana's variables."""
    legend: str
    """Legend with labels as {{name}}; in a table, the column's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrafanaPanel:
    """One chart, value or table of a dashboard."""

    title: str
    description: str
    """Tooltip of the panel: meaning of the numbers, and what to look for."""
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat", "table"] = "timeseries"
    unit: str = "short"
    """Grafana's unit, such as short, s, bytes, or percentunit (1 is 100 %)."""
    stacked: bool = False
    width: int = 8
    """In columns of the dashboard, which has 24."""
    height: int | None = None
    """In units of 30 pixels; None uses the default of the kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    uid: str
    title: str
    panels: tuple[GrafanaPanel, ...]
    all_runs: bool = False
    """True for a dashboard of all runs, without a variable that selects runs."""


def dashboard_json(dashboard: Dashboard) -> dict[str, Any]:
    """Renders a dashboard in the form that Grafana loads."""
    positions = _grid_positions(dashboard.panels)
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["tvr"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [_link_to_other_dashboards()],
        "templating": {"list": list(_variables(dashboard))},
        "panels": [
            _panel(panel, number, position)
            for number, (panel, position) in enumerate(
                zip(dashboard.panels, positions, strict=True), 1
            )
        ],
    }


def _grid_positions(panels: Sequence[GrafanaPanel]) -> Iterator[dict[str, int]]:
    """Places panels from left to right, in rows of `COLUMNS` columns."""
    x = y = row = 0
    for panel in panels:
        height = panel.height or HEIGHTS[panel.kind]
        if x + panel.width > COLUMNS:
            x, y, row = 0, y + row, 0
        yield {"x": x, "y": y, "w": panel.width, "h": height}
        x, row = x + panel.width, max(row, height)


def _panel(panel: GrafanaPanel, number: int, position: dict[str, int]) -> dict[str, Any]:
    is_table = panel.kind == "table"
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "gridPos": position,
        "datasource": SOURCE,
        "targets": [
            {
                "refId": letter,
                "datasource": SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "instant": is_table,
                "range": not is_table,
                "format": "table" if is_table else "time_series",
            }
            for letter, query in zip(string.ascii_uppercase, panel.queries, strict=False)
        ],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel),
        "transformations": _columns(panel) if is_table else [],
    }


def _field(panel: GrafanaPanel) -> dict[str, Any]:
    field: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "timeseries":
        mode = "normal" if panel.stacked else "none"
        field["custom"] = {
            "fillOpacity": 40 if panel.stacked else 0,
            "showPoints": "never",
            "stacking": {"mode": mode, "group": "A"},
        }
    return field


def _options(panel: GrafanaPanel) -> dict[str, Any]:
    if panel.kind == "table":
        return {"frameIndex": 0, "showHeader": True}
    if panel.kind == "timeseries":
        return {
            "legend": {
                "displayMode": "list",
                "placement": "bottom",
                "showLegend": True,
                "calcs": ["lastNotNull"],
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "auto",
        "colorMode": "none",
        "graphMode": "none",
        "justifyMode": "auto",
        "percentChangeColorMode": "standard",
        "showPercentChange": False,
        "textMode": "auto",
        "wideLayout": True,
    }


def _columns(panel: GrafanaPanel) -> list[dict[str, Any]]:
    """Transformations that merge the queries of a table into one row per run."""
    letters = zip(string.ascii_uppercase, panel.queries, strict=False)
    names = {f"Value #{letter}": query.legend for letter, query in letters}
    return [
        {"id": "merge", "options": {}},
        {
            "id": "organize",
            "options": {"excludeByName": {"Time": True}, "renameByName": names},
        },
    ]


def _variables(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "type": "datasource", "query": "prometheus"}
    if not dashboard.all_runs:
        yield {
            "name": "run",
            "type": "query",
            "datasource": SOURCE,
            "query": 'label_values({__name__=~"tvr_train_step|tvr_pack_done_clips"}, run)',
            "refresh": 2,  # refresh on a change of the time range, which changes the list of runs
            "sort": 1,
            "multi": True,
            "includeAll": True,
        }


def _link_to_other_dashboards() -> dict[str, Any]:
    return {
        "title": "tvr",
        "type": "dashboards",
        "tags": ["tvr"],
        "asDropdown": True,
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
        "icon": "external link",
        "tooltip": "",
    }
