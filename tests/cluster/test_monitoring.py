"""Shipped rules pass promtool's checks and unit tests; dashboards match Grafana's schema.

Rules and dashboards use existing metrics only, and every metric appears in one of them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from builders.monitoring import (
    RULES,
    dashboards,
    panel_queries,
    rule_name,
    rule_queries,
    rules,
    selectors,
    with_values,
    write_files,
)

from tvr.launchers.cli import COMMANDS, main
from tvr.launchers.monitoring.write import DASHBOARDS, RULE_TESTS, divide_times, monitoring_files
from tvr.trainer.config import Config
from tvr.trainer.monitoring.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "launchers" / "monitoring"
GRAFANA_TYPES = ROOT / "tests" / "grafana_schema"
PROMETHEUS_LABELS = {"up": {"job"}, "ALERTS": {"alertname", "alertstate", "severity"}}
TARGET_LABELS = {"run", "host", "instance"}
ALL_RULES = rules(SHIPPED)
ALERTS = [rule for rule in ALL_RULES if "alert" in rule]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("monitoring")
    write_files(folder, folder / "targets", alertmanagers=["alerts.example:9093"])
    (folder / "targets").mkdir()
    (folder / "targets" / "run.json").write_text('[{"targets": ["127.0.0.1:1"]}]')
    return folder


def promtool(*argv: str | Path, fails: bool = False) -> str:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool (apt-get install prometheus)")
    line = ["promtool", *map(str, argv)]
    ended = subprocess.run(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
    )
    assert ended.returncode == int(fails), ended.stdout
    return ended.stdout


def test_promtool_accepts_configuration_rules_and_their_tests(written: Path) -> None:
    assert "WARNING" not in promtool("check", "config", written / "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", *(written / name for name in RULES))
    assert "SUCCESS" in promtool("test", "rules", written / RULE_TESTS)
    assert "SUCCESS" in promtool("test", "rules", SHIPPED / RULE_TESTS)


BREAK = {
    "never": lambda rule: {"expr": f"({rule['expr']}) and on () vector(1) > 1"},
    "always, or off": lambda rule: {
        "expr": "vector(1)" if "alert" in rule else f"({rule['expr']}) * 1.01"
    },
    "too late": lambda rule: {"for": "30m"},
}


def test_a_broken_rule_fails_its_unit_test(tmp_path: Path) -> None:
    tests = yaml.safe_load((SHIPPED / RULE_TESTS).read_text())
    cases = {
        f"{rule_name(rule)} {how}".replace(":", "-"): (rule, change(rule))
        for rule in ALL_RULES
        for how, change in BREAK.items()
        if "alert" in rule or how != "too late"
    }
    for case, (broken, change) in cases.items():
        (tmp_path / case).mkdir()
        changed = [{**rule, **change} if rule == broken else rule for rule in ALL_RULES]
        groups = {"groups": [{"name": "all", "rules": changed}]}
        (tmp_path / case / "all.yml").write_text(json.dumps(groups))
        # Only the tests of this rule, of which one must fail.
        rule_tests = [test for test in tests["tests"] if rule_name(broken) in json.dumps(test)]
        some = {**tests, "rule_files": ["all.yml"], "tests": rule_tests}
        (tmp_path / case / RULE_TESTS).write_text(json.dumps(some))
    output = promtool(
        "test", "rules", *(tmp_path / case / RULE_TESTS for case in cases), fails=True
    )
    parts = dict(zip(cases, output.split("Unit Testing:")[1:], strict=True))
    for case, (broken, _) in cases.items():
        assert "FAILED" in parts[case], case
        assert rule_name(broken) in parts[case].partition("FAILED")[2]


@pytest.mark.parametrize("rule", ALERTS, ids=rule_name)
def test_alert_has_a_runbook(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert "$labels.run" in rule["annotations"]["summary"]
    runbook = rule["annotations"]["runbook"]
    assert len(runbook) > 80
    titles = {dashboard.title for dashboard in DASHBOARDS}
    assert set(re.findall(r'dashboard\s"([^"]+)"', runbook)) <= titles
    assert set(re.findall(r"\bTvr\w+", runbook)) <= {rule_name(alert) for alert in ALERTS}
    assert set(re.findall(r"`tvr (\w+)", runbook)) <= set(COMMANDS)
    settings = {
        f"{section}.{field.name}"
        for section, kind in get_type_hints(Config).items()
        for field in dataclasses.fields(kind)
    }
    named = set(re.findall(r"\b(?:data|train|checkpoint|loss|model|metrics)\.[a-z_]+", runbook))
    assert named <= settings


def test_queries_use_existing_metrics_and_labels(written: Path) -> None:
    table = {metric.name: metric for metric in METRICS}
    recorded = {rule_name(rule) for rule in ALL_RULES if "record" in rule}
    for query in (*panel_queries(written), *rule_queries(written)):
        for selector in selectors(query.expr):
            name, matchers = selector.name, selector.matchers.matchers
            if name not in table:
                assert name in recorded | set(PROMETHEUS_LABELS), f"{query.location}: {name}"
                allowed = PROMETHEUS_LABELS.get(name, {"part"}) | TARGET_LABELS
                assert {matcher.name for matcher in matchers} <= allowed, query
                continue
            metric = table[name]
            assert {m.name for m in matchers} <= {*metric.label_names, *TARGET_LABELS}, query
            for matcher in matchers:
                if matcher.name in metric.labels:
                    values = set(matcher.value.split("|"))
                    assert values <= set(metric.labels[matcher.name]), query


def test_every_metric_is_used(written: Path) -> None:
    queries = [*panel_queries(written), *rule_queries(written)]
    shown = {selector.name for query in queries for selector in selectors(query.expr)}
    assert {metric.name for metric in METRICS} - shown == set()


def test_dashboards_are_complete(written: Path) -> None:
    found = dashboards(written)
    titles = {dashboard["title"].removeprefix("tvr: ") for dashboard in found}
    assert titles == {
        "run",
        "data",
        "communication and memory",
        "hard-negative mining",
        "fleet",
    }
    assert len({dashboard["uid"] for dashboard in found}) == len(found)
    for dashboard in found:
        panels = dashboard["panels"]
        assert_unique(panel["id"] for panel in panels)
        assert_unique(panel["title"] for panel in panels)
        for panel in panels:
            assert panel["description"].endswith((".", "%."))
            assert_unique(target["refId"] for target in panel["targets"])
            # Two series with one legend could not be distinguished.
            assert_unique(target["legendFormat"] for target in panel["targets"])
            for target in panel["targets"]:
                assert list(selectors(with_values(target["expr"])))
                selects_runs = "$run" in target["expr"]
                assert selects_runs == (dashboard["title"] != "tvr: fleet"), panel["title"]
        cells = Counter(
            (x, y)
            for place in (panel["gridPos"] for panel in panels)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        )
        assert set(cells.values()) == {1}
        assert max(x for x, _ in cells) < 24


def assert_unique(values: Any) -> None:
    assert [value for value, count in Counter(values).items() if count > 1] == []


def test_invalid_promql_is_detected() -> None:
    with pytest.raises(ValueError, match="unclosed"):
        list(selectors("max by (run (tvr_train_step)"))


BREAKS = {
    "a key of a dashboard": ('"graphTooltip"', '"graphTooltips"'),
    "a key of a panel": ('"gridPos"', '"gridpos"'),
    "an option": ('"displayMode"', '"displaymode"'),
    "a value of an option": ('"placement": "bottom"', '"placement": "below"'),
    "a value of a field": ('"showPoints": "never"', '"showPoints": "no"'),
    "a key of a target": ('"legendFormat"', '"legend"'),
    "a unit": ('"unit": "s"', '"unit": 1'),
    "a null": ('"title": "Loss"', '"title": null'),
}


def test_dashboards_match_grafanas_types(written: Path, tmp_path: Path) -> None:
    installed = ROOT / "build" / "grafana_schema"
    tsc = installed / "node_modules" / ".bin" / "tsc"
    if shutil.which("node") is None or not tsc.exists():
        pytest.skip("needs node and `make grafana-schema`")
    (tmp_path / "node_modules").symlink_to(installed / "node_modules")
    texts = {f"whole {d['uid']}": json.dumps(d, indent=1) for d in dashboards(written)}
    whole = texts["whole tvr-run"]
    for what, (right, wrong) in BREAKS.items():
        assert right in whole
        texts[f"broken {what}"] = whole.replace(right, wrong, 1)
    head = (GRAFANA_TYPES / "check.ts").read_text()
    files = {f"{number}.ts": name for number, name in enumerate(texts)}
    for file, name in files.items():
        (tmp_path / file).write_text(f"{head}export const dashboard: Dashboard = {texts[name]};\n")
    options = "--noEmit --strict --skipLibCheck --module esnext --moduleResolution bundler"
    line = ["node", str(tsc), *options.split(), "--target", "es2022", *files]
    ended = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    refused = {files[file] for file in re.findall(r"^(\d+\.ts)\(", ended.stdout, re.MULTILINE)}
    assert refused == {name for name in texts if name.startswith("broken")}, ended.stdout


def test_command_writes_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, targets = tmp_path / "out", tmp_path / "a b"
    line = ["launch", "monitor", "--out", str(out), "--targets", str(targets), "--targets", "here"]
    assert main([*line, "--prometheus", "http://p:1", "--alertmanager", "a:1"]) == 0
    assert str(out / "prometheus.yml") in capsys.readouterr().out
    files = {path for path in out.rglob("*") if path.is_file()}
    assert files == set(monitoring_files(out, targets=[targets]))
    config = yaml.safe_load((out / "prometheus.yml").read_text())
    assert config["rule_files"] == list(RULES)
    (job,) = config["scrape_configs"]
    patterns = [str(targets / "*.json"), str(Path("here").absolute() / "*.json")]
    assert job["file_sd_configs"][0]["files"] == patterns
    assert config["alerting"]["alertmanagers"][0]["static_configs"] == [{"targets": ["a:1"]}]
    provisioning = out / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "tvr.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://p:1"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "tvr.yml").read_text())["providers"]
    folder = Path(provider["options"]["path"])
    assert len(list(folder.glob("*.json"))) == 5


def test_speed_changes_only_times(tmp_path: Path) -> None:
    write_files(tmp_path, tmp_path, speed=60)
    assert not (tmp_path / RULE_TESTS).exists()
    promtool("check", "config", tmp_path / "prometheus.yml")
    duration = re.compile(r"(?<![\w-])\d+(?:ms|[smh])\b")
    for before, after in zip(ALL_RULES, rules(tmp_path), strict=True):
        assert before.keys() == after.keys()
        assert duration.sub("T", json.dumps(before)) == duration.sub("T", json.dumps(after))
    times = "for: 30s [5m] [1h] offset 10m\nsummary: 10 minutes, run:x:rate5m"
    assert divide_times(times, 60) == (
        "for: 1000ms [5000ms] [60000ms] offset 10000ms\nsummary: 10 minutes, run:x:rate5m"
    )
    assert divide_times(times, 1) == times


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--speed", "0.5"], "--speed 0.5 must be at least 1"),
        (["--targets", "a/*"], "contains a wildcard"),
    ],
)
def test_bad_usage_is_refused(
    argv: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = ["launch", "monitor", "--out", str(out), "--targets", str(tmp_path), *argv]
    assert main(line) == 2
    assert reason in capsys.readouterr().err
    assert not out.exists()
