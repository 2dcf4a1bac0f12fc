"""Dashboards as Grafana reads them: from panels and queries to its JSON, as pure functions."""

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
    """PromQL, with Grafana's variables."""
    legend: str
    """With labels as {{name}}; of a table, the column's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture."""

    title: str
    about: str
    """Shown at the panel's corner: what the numbers are, and what to look for."""
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat", "table"] = "timeseries"
    unit: str = "short"
    """As Grafana names it: short, s, bytes, percentunit (1 is 100 %)."""
    stacked: bool = False
    width: int = 8
    """Of 24 columns."""
    height: int | None = None
    """In units of 30 pixels; none: as its kind has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    uid: str
    title: str
    panels: tuple[Panel, ...]
    of_all_runs: bool = False
    """Without a variable for the runs."""


def dashboard_json(dashboard: Dashboard) -> dict[str, Any]:
    """What Grafana loads."""
    places = _places(dashboard.panels)
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["tvr"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [_link_to_the_others()],
        "templating": {"list": list(_variables(dashboard))},
        "panels": [
            _panel(panel, number, place)
            for number, (panel, place) in enumerate(zip(dashboard.panels, places, strict=True), 1)
        ],
    }


def _places(panels: Sequence[Panel]) -> Iterator[dict[str, int]]:
    """Side by side as far as there is room."""
    x = y = row = 0
    for panel in panels:
        height = panel.height or HEIGHTS[panel.kind]
        if x + panel.width > COLUMNS:
            x, y, row = 0, y + row, 0
        yield {"x": x, "y": y, "w": panel.width, "h": height}
        x, row = x + panel.width, max(row, height)


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    is_table = panel.kind == "table"
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "gridPos": place,
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


def _field(panel: Panel) -> dict[str, Any]:
    field: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "timeseries":
        mode = "normal" if panel.stacked else "none"
        field["custom"] = {
            "fillOpacity": 40 if panel.stacked else 0,
            "showPoints": "never",
            "stacking": {"mode": mode, "group": "A"},
        }
    return field


def _options(panel: Panel) -> dict[str, Any]:
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


def _columns(panel: Panel) -> list[dict[str, Any]]:
    """One line for all queries' values of a run, under the queries' names."""
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
    if not dashboard.of_all_runs:
        yield {
            "name": "run",
            "type": "query",
            "datasource": SOURCE,
            "query": 'label_values({__name__=~"tvr_train_step|tvr_pack_done_clips"}, run)',
            "refresh": 2,  # runs come and go within the time shown
            "sort": 1,
            "multi": True,
            "includeAll": True,
        }


def _link_to_the_others() -> dict[str, Any]:
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
