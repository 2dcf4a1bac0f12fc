"""`tvr launch monitor`: writes the configuration files of Prometheus and Grafana.

OUT/prometheus.yml                 scrape configuration
OUT/recording.yml, alerts.yml      recording rules and alerts
OUT/rules.test.yml                 unit tests of the rules
OUT/grafana/dashboards/*.json      dashboards
OUT/grafana/provisioning/          makes Grafana load the dashboards and the data source
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from tvr.launchers.exit_codes import EXIT_DONE, EXIT_USAGE
from tvr.launchers.monitoring.dashboards import DASHBOARDS
from tvr.launchers.monitoring.grafana import dashboard_json

HERE = Path(__file__).parent
RULE_FILES = ("recording.yml", "alerts.yml")
RULE_TESTS = "rules.test.yml"
UNITS_S = {"s": 1, "m": 60, "h": 3600}
# Durations in rules and configuration; no match in names or in texts of alerts.
DURATION = re.compile(r"(\[|offset |for: |(?:scrape|evaluation)_interval: )(\d+)([smh])\b")


def monitor(argv: Sequence[str]) -> int:
    """Runs `tvr launch monitor ...` and returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        files = monitoring_files(
            options.out.absolute(),
            targets=options.targets,
            alertmanagers=options.alertmanager,
            prometheus=options.prometheus,
            speed=options.speed,
        )
    except ValueError as error:
        print(f"tvr launch monitor: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    grafana = options.out.absolute() / "grafana"
    print(f"prometheus --config.file={options.out.absolute() / 'prometheus.yml'}")
    print(f"GF_PATHS_PROVISIONING={grafana / 'provisioning'} grafana server")
    return EXIT_DONE


def monitoring_files(
    out: Path,
    *,
    targets: Sequence[Path],
    alertmanagers: Sequence[str] = (),
    prometheus: str = "http://localhost:9090",
    speed: float = 1.0,
) -> dict[Path, str]:
    """Renders all files.

    Args:
        out: Absolute path of the folder for the files.
        targets: Folders of file_sd target files.
        alertmanagers: Addresses HOST:PORT.
        prometheus: URL under which Grafana reaches Prometheus.
        speed: Divisor of every time in the rules; no time becomes shorter than a second.

    Returns:
        Text of each file by its path.

    Raises:
        ValueError: `speed` is below 1, or a targets folder contains a wildcard.
    """
    if not speed >= 1:
        raise ValueError(f"--speed {speed} must be at least 1")
    for folder in targets:
        if "*" in str(folder):
            raise ValueError(
                f"--targets {folder} contains a wildcard; give each folder by its name"
            )
    patterns = [str(folder.absolute() / "*.json") for folder in targets]
    values = {
        "targets": json.dumps(patterns),
        "alertmanagers": json.dumps(list(alertmanagers)),
        "prometheus": json.dumps(prometheus),
        "dashboards": json.dumps(str(out / "grafana" / "dashboards")),
    }
    provisioning = out / "grafana" / "provisioning"
    files = {
        out / "prometheus.yml": divide_times(_fill_template("prometheus.yml", values), speed),
        **{out / name: divide_times(_read_template(name), speed) for name in RULE_FILES},
        provisioning / "datasources" / "tvr.yml": _fill_template("grafana-datasource.yml", values),
        provisioning / "dashboards" / "tvr.yml": _fill_template("grafana-dashboards.yml", values),
    }
    if speed == 1:  # the tests expect the original times
        files[out / RULE_TESTS] = _read_template(RULE_TESTS)
    for dashboard in DASHBOARDS:
        text = json.dumps(dashboard_json(dashboard), indent=1) + "\n"
        files[out / "grafana" / "dashboards" / f"{dashboard.uid}.json"] = text
    return files


def divide_times(text: str, speed: float) -> str:
    """Divides every duration in the rules by `speed`, down to a second."""

    def divided(match: re.Match[str]) -> str:
        before, number, unit = match.groups()
        seconds = max(1.0, int(number) * UNITS_S[unit] / speed)
        return f"{before}{round(1000 * seconds)}ms"

    return text if speed == 1 else DURATION.sub(divided, text)


def _read_template(name: str) -> str:
    return (HERE / name).read_text()


def _fill_template(name: str, values: Mapping[str, str]) -> str:
    return Template(_read_template(name)).substitute(values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tvr launch monitor",
        description="Writes the configuration of Prometheus and Grafana for monitoring runs: "
        "scrape configuration, recording rules and alerts with their unit tests, dashboards.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="output folder")
    parser.add_argument(
        "--targets",
        type=Path,
        required=True,
        action="append",
        metavar="FOLDER",
        help="folder of file_sd target files: that of `tvr launch slurm --targets`, or"
        " RUN/metrics of a run; may be repeated",
    )
    parser.add_argument(
        "--alertmanager",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="Alertmanager that receives the alerts; may be repeated",
    )
    parser.add_argument(
        "--prometheus",
        default="http://localhost:9090",
        metavar="URL",
        help="URL of Prometheus for Grafana (default: %(default)s)",
    )
    parser.add_argument(
        "--speed",
        type=float,
        default=1.0,
        metavar="N",
        help="divide all times in the rules by N, to at least 1 s, in order to try out the alerts:"
        " with 60, one hour becomes one minute (default: 1)",
    )
    return parser
