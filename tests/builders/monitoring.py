"""Reads the files of `tvr launch monitor`: rules, queries and their selectors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from promql_parser import VectorSelector

from tvr.launchers.monitoring.write import monitoring_files

RULES = ("recording.yml", "alerts.yml")
# Values for Grafana's variables.
VARIABLES = {"$run": ".+", "$__rate_interval": "10s", "$__range": "1m"}


@dataclass(frozen=True, slots=True)
class LocatedQuery:
    """A PromQL query, and the panel or rule that it belongs to."""

    location: str
    expr: str


def write_files(out: Path, *targets: Path, **options: Any) -> None:
    for path, text in monitoring_files(out, targets=targets, **options).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def rules(folder: Path) -> list[dict[str, Any]]:
    groups = [g for name in RULES for g in yaml.safe_load((folder / name).read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def rule_name(rule: dict[str, Any]) -> str:
    return rule.get("record") or rule["alert"]


def dashboards(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "grafana" / "dashboards").glob("*.json"))
    return [json.loads(path.read_text()) for path in paths]


def panel_queries(folder: Path) -> list[LocatedQuery]:
    """Returns the queries of all panels, with values for Grafana's variables."""
    return [
        LocatedQuery(
            f"{dashboard['uid']}: {panel['title']} {target['refId']}", with_values(target["expr"])
        )
        for dashboard in dashboards(folder)
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]


def rule_queries(folder: Path) -> list[LocatedQuery]:
    return [LocatedQuery(rule_name(rule), rule["expr"]) for rule in rules(folder)]


def with_values(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = re.sub(re.escape(name) + r"\b", value, expr)
    assert "$" not in expr, expr
    return expr


def selectors(expr: str) -> Iterator[VectorSelector]:
    """Yields the vector selectors of a query; raises ValueError if it is not PromQL."""
    found: list[VectorSelector] = []

    def visit(node: Any) -> None:
        if isinstance(node, VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expr), visit)
    yield from found
