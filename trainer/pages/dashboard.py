"""Writes the dashboard of runs: one self-contained page that draws its charts in the browser.

The page holds the numbers and plotly's JavaScript. While a run is not finished, the page checks
every few seconds whether its file was replaced, and loads the new numbers.
"""

from __future__ import annotations

import base64
import gzip
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from tvr.data_prep.exporter.metrics_http import job_label
from tvr.data_prep.html_page import page_template
from tvr.launchers.atomic_write import write_atomically
from tvr.trainer.monitoring.run_log import LOG, RunLog, read_log
from tvr.trainer.pages.history import Curve, Series, clock, history, thinned
from tvr.trainer.pages.panels import Panel, panels
from tvr.trainer.resilience.failure_file import FOLDER as FAILURES
from tvr.trainer.resilience.failure_file import FailureFile
from tvr.trainer.run_files import CONFIG, named_settings

# A watcher uses at most a tenth of a core, however long the log is.
WATCH_EVERY_S = 5.0
SHARE_OF_A_CORE = 0.1
# A run is "silent" if it logs nothing for this long: evaluations take longer than steps.
SILENT_S, SILENT_STEPS = 120.0, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run, read from its folder."""

    name: str
    config: Mapping[str, Any]
    log: RunLog
    history: Mapping[Series, Curve]
    changed_at: float
    """Unix time of the last change of the log."""
    failure: str | None
    """The failure that ended its last job; None if the run has continued since."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config["train"]["steps"]

    @property
    def step(self) -> int:
        return self.log.steps[-1]["step"] if self.log.steps else 0

    @property
    def state(self) -> str:
        """One of finished, failed, preempted and running."""
        saves = [event for event in self.log.saves if "error" not in event]
        ends = [event["step"] for event in (*saves, *self.log.evaluations)]
        # A background final save is logged after the final evaluation.
        if ends.count(self.steps) >= 1 + (self.config["data"]["test"] is not None):
            return "finished"
        if self.failure is not None:
            return "failed"
        left = [event["step"] for event in self.log.preempted]
        return "preempted" if left and left[-1] == self.step else "running"


def read_run(folder: Path) -> Run:
    """Reads the run in a folder.

    Raises:
        ValueError: the folder has no run.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no run: it has no {CONFIG}")
    config, path = json.loads((folder / CONFIG).read_text()), folder / LOG
    changed_at = (path if path.exists() else folder / CONFIG).stat().st_mtime
    log = read_log(path.read_text() if path.exists() else "")
    return Run(
        name=job_label(folder),
        config=config,
        log=log,
        history=history(log, config),
        changed_at=changed_at,
        failure=_failure(folder, since=changed_at),
    )


def write_dashboard(folders: Sequence[Path], out: Path) -> bool:
    """Writes the page of these runs atomically; returns True if all of them have finished.

    Raises:
        ValueError: a folder has no run.
    """
    runs = [read_run(folder) for folder in folders]
    page = page_template(Path(__file__).parent, "dashboard.html.jinja").render(
        name=", ".join(run.name for run in runs),
        content=page_content(runs, panels([run.history for run in runs])),
        library=plotly_library(),
    )
    write_atomically(out, page)
    return all(run.state == "finished" for run in runs)


def watch(folders: Sequence[Path], out: Path) -> None:
    """Rewrites the page whenever a log grows, until all runs have finished."""
    while True:
        seen, began = _stamps(folders), time.monotonic()
        if write_dashboard(folders, out):
            return
        pause_s = max(WATCH_EVERY_S, (time.monotonic() - began) / SHARE_OF_A_CORE)
        time.sleep(pause_s)
        while _stamps(folders) == seen:
            time.sleep(WATCH_EVERY_S)


def _stamps(folders: Sequence[Path]) -> list[tuple[int, int]]:
    """Times and sizes of the files that change when a run continues or fails."""
    files = [file for folder in folders for file in (folder / LOG, *_failure_files(folder))]
    stats = [file.stat() for file in files if file.exists()]
    return [(stat.st_mtime_ns, stat.st_size) for stat in stats]


def page_content(runs: Sequence[Run], groups: Mapping[str, Sequence[Panel]]) -> dict[str, Any]:
    """Returns the data that panels.js.jinja draws: the runs, and the panels of each group."""
    return {
        "written": time.time(),
        "runs": [_run_data(run) for run in runs],
        "differing": _differing(runs),
        "groups": [
            {"name": name, "panels": [asdict(panel) for panel in found]}
            for name, found in groups.items()
        ],
    }


def _run_data(run: Run) -> dict[str, Any]:
    """A run's row in the table, its marks on the axis, and its clock."""
    last = run.log.steps[-1] if run.log.steps else {}
    elapsed_s = last.get("elapsed_s", 0.0)
    (time_of,) = thinned([clock(run.log)])
    return {
        "name": run.name,
        "state": run.state,
        "failure": run.failure,
        "step": run.step,
        "steps": run.steps,
        "epoch": last.get("epoch"),
        "elapsed_s": elapsed_s,
        "remaining_s": elapsed_s / run.step * (run.steps - run.step) if run.step else None,
        "changed_at": run.changed_at,
        "silent_after_s": SILENT_S + SILENT_STEPS * elapsed_s / max(1, len(run.log.steps)),
        "loss": last.get("loss"),
        "recall_at_1": {
            direction: run.history[series].y[-1]
            for direction in ("text_to_video", "video_to_text")
            if (series := ("tvr_evaluation_recall_ratio", "test", direction, "1")) in run.history
        },
        "pairs_per_s": last.get("samples_per_s"),
        "waiting": last["data_wait_s"] / last["step_s"] if last else None,
        "replaced": len(run.log.replaced),
        "marks": _marks(run.log),
        "clock": {"x": time_of.x, "y": time_of.y},
    }


def _marks(log: RunLog) -> list[dict[str, Any]]:
    """Restarts, preemptions and failed saves, by step."""
    marks = [(event["step"], "preempted") for event in log.preempted]
    marks += [(event["step"], "save failed") for event in log.saves if "error" in event]
    marks += [(step, "resumed") for step in log.resumed_at]
    steps = sorted({step for step, _ in marks})
    return [{"step": step, "kinds": [kind for at, kind in marks if at == step]} for step in steps]


def _differing(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Settings that differ between the runs."""
    settings = [dict(named_settings(run.config)) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    rows = [(name, [json.dumps(one.get(name)) for one in settings]) for name in names]
    return [{"name": name, "values": values} for name, values in rows if len(set(values)) > 1]


def _failure_files(folder: Path) -> list[Path]:
    return sorted((folder / FAILURES).glob("*.json"))


def _failure(folder: Path, since: float) -> str | None:
    """The newest failure, if it is newer than the log."""
    for path in reversed(_failure_files(folder)):
        failure = FailureFile(path, rank=0).read()
        if failure is not None and path.stat().st_mtime >= since:
            return f"rank {failure.rank} on {failure.host}: {failure.error}"
    return None


@cache
def plotly_library() -> str:
    """Returns plotly's JavaScript, compressed with gzip and encoded in base64."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
