"""`tvr launch monitor`: what Prometheus and Grafana need to look at runs, as files.

OUT/prometheus.yml, recording.yml, alerts.yml
OUT/rules.test.yml                 unit tests of the rules, for who changes them
OUT/grafana/dashboards/*.json
OUT/grafana/provisioning/          what makes Grafana load them
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
from tvr.launchers.monitoring.dashboard_communication import COMMUNICATION
from tvr.launchers.monitoring.dashboard_data import DATA
from tvr.launchers.monitoring.dashboard_fleet import FLEET
from tvr.launchers.monitoring.dashboard_mining import MINING
from tvr.launchers.monitoring.dashboard_run import RUN_OVERVIEW
from tvr.launchers.monitoring.grafana import dashboard_json

DASHBOARDS = (RUN_OVERVIEW, DATA, COMMUNICATION, MINING, FLEET)
HERE = Path(__file__).parent
RULES = ("recording.yml", "alerts.yml")
TESTS = "rules.test.yml"
UNITS_S = {"s": 1, "m": 60, "h": 3600}
# Of the rules' times only, never of a name or of what an alert says.
DURATION = re.compile(r"(\[|offset |for: |(?:scrape|evaluation)_interval: )(\d+)([smh])\b")


def monitor(argv: Sequence[str]) -> int:
    """`tvr launch monitor ...`: returns the exit code."""
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
    """The texts of the files below `out`, an absolute path.

    `targets` are folders of file_sd; `speed` divides every time of the rules, down to a second.

    Raises:
        ValueError: naming what cannot be used.
    """
    if not speed >= 1:
        raise ValueError(f"--speed {speed} must be at least 1")
    for folder in targets:
        if "*" in str(folder):
            raise ValueError(f"--targets {folder} is a pattern; give folders, each by its name")
    patterns = [str(folder.absolute() / "*.json") for folder in targets]
    values = {
        "targets": json.dumps(patterns),
        "alertmanagers": json.dumps(list(alertmanagers)),
        "prometheus": json.dumps(prometheus),
        "dashboards": json.dumps(str(out / "grafana" / "dashboards")),
    }
    provisioning = out / "grafana" / "provisioning"
    files = {
        out / "prometheus.yml": faster(_filled("prometheus.yml", values), speed),
        **{out / name: faster(_shipped(name), speed) for name in RULES},
        provisioning / "datasources" / "tvr.yml": _filled("grafana-datasource.yml", values),
        provisioning / "dashboards" / "tvr.yml": _filled("grafana-dashboards.yml", values),
    }
    if speed == 1:  # they test the rules' own times
        files[out / TESTS] = _shipped(TESTS)
    for dashboard in DASHBOARDS:
        text = json.dumps(dashboard_json(dashboard), indent=1) + "\n"
        files[out / "grafana" / "dashboards" / f"{dashboard.uid}.json"] = text
    return files


def faster(text: str, speed: float) -> str:
    """Rules whose windows and waits are shorter by this factor, and at least a second long."""

    def shorter(found: re.Match[str]) -> str:
        before, number, unit = found.groups()
        seconds = max(1.0, int(number) * UNITS_S[unit] / speed)
        return f"{before}{round(1000 * seconds)}ms"

    return text if speed == 1 else DURATION.sub(shorter, text)


def _shipped(name: str) -> str:
    return (HERE / name).read_text()


def _filled(name: str, values: Mapping[str, str]) -> str:
    return Template(_shipped(name)).substitute(values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tvr launch monitor",
        description="Writes what Prometheus and Grafana need to look at runs: configuration, "
        "recording and alert rules with their unit tests, dashboards.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the files")
    parser.add_argument(
        "--targets",
        type=Path,
        required=True,
        action="append",
        metavar="FOLDER",
        help="where runs say how they are reached: `tvr launch slurm --targets`, or"
        " RUN/metrics of a run; several times for several",
    )
    parser.add_argument(
        "--alertmanager",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="who is told of alerts; several times for several",
    )
    parser.add_argument(
        "--prometheus",
        default="http://localhost:9090",
        metavar="URL",
        help="where Grafana finds Prometheus (default: %(default)s)",
    )
    parser.add_argument(
        "--speed",
        type=float,
        default=1.0,
        metavar="N",
        help="makes the rules' windows and waits N times shorter (at least 1 s), to try the alerts"
        " out: with 60 an hour before is a minute before (default: 1)",
    )
    return parser
