"""Writes report.html, a self-contained page: results, curves, and test queries as pictures.

The curves are panels of the dashboard, drawn by the same script.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
from PIL import Image

from tvr.data_prep.html_page import page_template, picture_strip
from tvr.launchers.atomic_write import write_atomically
from tvr.trainer.evaluation.results import stored_results
from tvr.trainer.monitoring.run_log import LOG, Event, RunLog
from tvr.trainer.pages.dashboard import Run, page_content, plotly_library, read_run
from tvr.trainer.pages.panels import panels
from tvr.trainer.records import TABLE_COLUMNS, WAYS, MetricBlock, metric_blocks, protocol_line
from tvr.trainer.run_files import CONFIG, EVALUATION

Thumbnails = Callable[[str], Sequence[Image.Image]]

SHOWN_QUERIES = 12
SHOWN_VIDEOS = 5
SHOWN_KEYS = 5
DIRECTIONS = {"text_to_video": "Text to video", "video_to_text": "Video to text"}
SHOWN_METRICS = (
    "tvr_train_loss",
    "tvr_evaluation_recall_ratio",
    "tvr_train_learning_rate",
    "tvr_train_pairs_per_second",
)
"""Metrics whose panels the report draws, in the order of the page."""
PACKAGES = ("tvr", "torch", "deepspeed", "transformers", "webdataset", "av", "numpy")


def write_report(
    run_dir: str | Path, *, thumbnails: Thumbnails | None = None, step: int | None = None
) -> Path:
    """Writes `run_dir`/report.html and returns its path.

    Args:
        thumbnails: Maps a clip's key to a few small frames; without it the page shows keys.
        step: Step whose evaluation the page shows; None: the last one.

    Raises:
        ValueError: config.json or log.jsonl is missing, or the step was not evaluated.
    """
    folder = Path(run_dir)
    for name in (CONFIG, LOG):
        _require(folder / name)
    run = read_run(folder)
    log, content = run.log, _chart_content(run)
    result = _last_result(folder, log) if step is None else stored_results(folder, step)
    if step is not None and result is None:
        raise ValueError(
            f"the checkpoint of step {step} was not evaluated: run `tvr evaluate --run-dir {folder}"
            f" --checkpoint {step}` first"
        )
    queries = choose_queries(result.get("queries", []) if result else [], SHOWN_QUERIES)
    page = page_template(Path(__file__).parent, "report.html.jinja").render(
        name="/".join(folder.resolve().parts[-2:]),
        summary=_summary(log),
        result=result,
        directions=DIRECTIONS,
        blocks=_blocks(result) if result else [],
        protocol=protocol_line(result["protocol"]) if result and "protocol" in result else "",
        content=content,
        library=plotly_library() if content else "",
        queries=[_shown_query(query, thumbnails) for query in queries],
        num_queries=len(result.get("queries", [])) if result else 0,
        replaced=_by_reason(log.replaced),
        # Every evaluation leaves out the same samples, so each sample is counted once.
        left_out=_by_reason({(bad["reason"], bad["key"]): bad for bad in log.left_out}.values()),
        resumed_at=log.resumed_at,
        changes=_changes(log),
        unreadable_lines=log.unreadable_lines,
        config=json.dumps(run.config, indent=2),
        versions=_versions(),
    )
    path = folder / "report.html"
    write_atomically(path, page)
    return path


def _last_result(folder: Path, log: RunLog) -> Event | None:
    path = folder / EVALUATION
    if path.is_file():
        return json.loads(path.read_text())
    return log.evaluations[-1] if log.evaluations else None


def _blocks(result: Event) -> list[dict[str, Any]]:
    """The tables of the page: one for each way of scoring."""
    return [
        {
            "title": block.title,
            "names": [name for name, key in TABLE_COLUMNS.items() if key in block.columns],
            "rows": [
                (
                    WAYS[way],
                    [
                        (_shown(key, values.get(key)), _interval(result, block, way, key))
                        for key in block.columns
                    ],
                )
                for way, values in block.ways.items()
            ],
        }
        for block in metric_blocks(result)
    ]


def _interval(result: Event, block: MetricBlock, way: str, key: str) -> str | None:
    """Ends of the 95 % interval of a raw metric, if the evaluation has it."""
    found = result.get("intervals", {}).get(way, {}).get(key)
    if found is None or block.title != "raw":
        return None
    return "{:.1f} to {:.1f}".format(*found)


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "mean_rank":
        return f"{value:.2f}"
    return f"{value:.1f}" if key == "median_rank" else f"{value:.1f} %"


def _changes(log: RunLog) -> list[dict[str, Any]]:
    """Settings that were changed when the run resumed; starts after the same step count once."""
    found = {
        (event["step"], name): {"step": event["step"], "name": name, "was": was, "now": now}
        for event in log.settings_changed
        for name, (was, now, _) in event["settings"].items()
    }
    return list(found.values())


def choose_queries(queries: Sequence[Event], count: int) -> list[Event]:
    """Returns `count` queries, best first: half hits, a quarter near misses, the rest misses.

    A hit has rank 1, a near miss rank 2 to 5. A clip with many captions appears once per group. If
    a group is too small, other groups fill its share.
    """
    by_rank = sorted(queries, key=lambda query: (query["rank"], query["caption"]))
    groups = (
        _one_per_clip(query for query in by_rank if query["rank"] == 1),
        _one_per_clip(query for query in by_rank if 1 < query["rank"] <= 5),
        _one_per_clip(query for query in reversed(by_rank) if query["rank"] > 5),
    )
    shares = [count // 2, count // 4, count - count // 2 - count // 4]
    taken = [min(len(group), share) for group, share in zip(groups, shares, strict=True)]
    for index, group in enumerate(groups):
        taken[index] = min(len(group), taken[index] + count - sum(taken))
    return [
        *_evenly(groups[0], taken[0]),
        *_evenly(groups[1], taken[1]),
        *groups[2][: taken[2]][::-1],
    ]


def _one_per_clip(queries: Iterable[Event]) -> list[Event]:
    first: dict[str, Event] = {}
    for query in queries:
        first.setdefault(query["key"], query)
    return list(first.values())


def _evenly(group: Sequence[Event], count: int) -> list[Event]:
    return [group[index * len(group) // count] for index in range(count)]


def _require(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the run_dir of a run that `tvr train` started")


def _summary(log: RunLog) -> list[tuple[str, str]]:
    if not log.steps:
        return []
    last = log.steps[-1]
    speed = float(np.median([event["samples_per_s"] for event in log.steps]))
    waited = sum(event["data_wait_s"] for event in log.steps)
    stepped = sum(event["step_s"] for event in log.steps)
    return [
        ("steps", f"{last['step']:,}"),
        ("epochs", f"{last['epoch']:.1f}"),
        *((f"epochs of {name}", f"{n:.1f}") for name, n in last.get("set_epochs", {}).items()),
        ("training time", _duration(last["elapsed_s"])),
        ("samples/s, median", f"{speed:,.1f}"),
        ("waiting for data", f"{100 * waited / stepped:.1f} %" if stepped else "-"),
        ("last loss", f"{last['loss']:.4f}"),
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _chart_content(run: Run) -> dict[str, Any] | None:
    """The data of the page's panels; None if the log has no step."""
    if not run.log.steps:
        return None
    found = [panel for group in panels([run.history]).values() for panel in group]
    shown = [panel for name in SHOWN_METRICS for panel in found if panel.metric == name]
    return page_content([run], {"Curves": shown})


def _shown_query(query: Event, thumbnails: Thumbnails | None) -> dict[str, Any]:
    right = query.get("keys", [query["key"]])
    clips = [
        {
            "key": clip["key"],
            "similarity": f"{clip['similarity']:.3f}",
            "is_right": clip["key"] in right,
            "place": f"{place}.",
            "strip": _strip(clip["key"], thumbnails),
        }
        for place, clip in enumerate(query["top"][:SHOWN_VIDEOS], start=1)
    ]
    if not any(clip["is_right"] for clip in clips):
        missed = {"key": query["key"], "similarity": "", "is_right": True}
        clips.append({**missed, "place": "right:", "strip": _strip(query["key"], thumbnails)})
    level = "first" if query["rank"] == 1 else "near" if query["rank"] <= 5 else "far"
    return {"caption": query["caption"], "rank": query["rank"], "level": level, "clips": clips}


def _strip(key: str, thumbnails: Thumbnails | None) -> str | None:
    """Joins the frames of a clip into one picture, as a data URL; None without frames."""
    frames = list(thumbnails(key)) if thumbnails else []
    return picture_strip(frames) if frames else None


def _by_reason(bad: Iterable[Event]) -> list[dict[str, Any]]:
    reasons: dict[str, list[str]] = {}
    for event in bad:
        reasons.setdefault(event["reason"], []).append(event["key"])
    rows = [
        {"reason": reason, "count": len(keys), "keys": list(dict.fromkeys(keys))[:SHOWN_KEYS]}
        for reason, keys in reasons.items()
    ]
    return sorted(rows, key=lambda row: (-row["count"], row["reason"]))


def _versions() -> list[tuple[str, str]]:
    found = [("python", python_version())]
    for name in PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            found.append((name, "not installed"))
    return found
