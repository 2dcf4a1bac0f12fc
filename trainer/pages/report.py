"""Writes report.html, a self-contained page: results, curves, and test queries as pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from tvr.data_prep.html_page import page_template, picture_strip
from tvr.launchers.atomic_write import write_atomically
from tvr.trainer.monitoring.run_log import LOG, Event, RunLog, read_log
from tvr.trainer.pages.plots import Series, line_chart
from tvr.trainer.run_files import CONFIG, EVALUATION

Thumbnails = Callable[[str], Sequence[Image.Image]]

SHOWN_QUERIES = 12
SHOWN_KEYS = 5
DIRECTIONS = {"text_to_video": "Text to video", "video_to_text": "Video to text"}
PACKAGES = ("tvr", "torch", "deepspeed", "transformers", "webdataset", "av", "numpy")


def write_report(run_dir: str | Path, *, thumbnails: Thumbnails | None = None) -> Path:
    """Writes `run_dir`/report.html and returns its path.

    Args:
        thumbnails: Returns a few small frames of a clip by its key; without it the page shows keys.

    Raises:
        ValueError: config.json or log.jsonl is missing.
    """
    folder = Path(run_dir)
    config = json.loads(_required(folder / CONFIG))
    log = read_log(_required(folder / LOG))
    result_file = folder / EVALUATION
    result = json.loads(result_file.read_text()) if result_file.is_file() else None
    if result is None and log.evaluations:
        result = log.evaluations[-1]
    queries = choose_queries(result.get("queries", []) if result else [], SHOWN_QUERIES)
    page = page_template(Path(__file__).parent, "report.html.jinja").render(
        name="/".join(folder.resolve().parts[-2:]),
        summary=_summary(log),
        result=result,
        directions=DIRECTIONS,
        charts=_charts(log),
        queries=[_shown_query(query, thumbnails) for query in queries],
        num_queries=len(result.get("queries", [])) if result else 0,
        replaced=_by_reason(log.replaced),
        # Every evaluation leaves out the same samples again.
        left_out=_by_reason({(bad["reason"], bad["key"]): bad for bad in log.left_out}.values()),
        resumed_at=log.resumed_at,
        unreadable_lines=log.unreadable_lines,
        config=json.dumps(config, indent=2),
        versions=_versions(),
    )
    path = folder / "report.html"
    write_atomically(path, page)
    return path


def choose_queries(queries: Sequence[Event], count: int) -> list[Event]:
    """A spread of `count` queries, best first: half of rank 1, a quarter near misses, the worst.

    A clip has many captions; in each of the three groups it is shown once.
    """
    by_rank = sorted(queries, key=lambda query: (query["rank"], query["caption"]))
    groups = (
        _one_per_clip(query for query in by_rank if query["rank"] == 1),
        _one_per_clip(query for query in by_rank if 1 < query["rank"] <= 5),
        _one_per_clip(query for query in reversed(by_rank) if query["rank"] > 5),
    )
    room = [count // 2, count // 4, count - count // 2 - count // 4]
    taken = [min(len(group), places) for group, places in zip(groups, room, strict=True)]
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


def _required(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the run_dir of a run that `tvr train` started")
    return path.read_text(encoding="utf-8")


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
        ("training time", _duration(last["elapsed_s"])),
        ("samples/s, median", f"{speed:,.1f}"),
        ("waiting for data", f"{100 * waited / stepped:.1f} %" if stepped else "-"),
        ("last loss", f"{last['loss']:.4f}"),
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _charts(log: RunLog) -> list[tuple[str, Markup]]:
    """Title and SVG of each chart that has something to show."""
    if not log.steps:
        return []
    steps = [event["step"] for event in log.steps]
    clock = ([0, *steps], [0.0, *(event["elapsed_s"] / 60 for event in log.steps)])
    last_step = max([*steps, *(event["step"] for event in log.evaluations)])

    def curve(key: str, label: str, colour: int, smooth: bool = False) -> list[Series]:
        known = [(event["step"], event[key]) for event in log.steps if event.get(key) is not None]
        x, y = zip(*known, strict=True) if known else ((), ())
        return [Series(label=label, x=x, y=y, colour=colour, smooth=smooth)] if known else []

    losses = [
        *curve("loss", "total", 0, smooth=True),
        *curve("similarity_loss", "similarity", 1, smooth=True),
        *curve("tpm_cl_loss", "TPM-CL", 2, smooth=True),
    ]
    rates = [*curve("learning_rate", "head", 0), *curve("encoder_learning_rate", "encoder", 1)]
    speed = curve("samples_per_s", "samples/s", 0, smooth=True)
    drawn = [
        (
            "Loss",
            line_chart(losses, name="loss", y_label="loss", last_step=last_step, log_if_wide=True),
        ),
        ("Recall on the test clips", _recall_chart(log.evaluations, last_step, clock)),
        ("Learning rate", line_chart(rates, name="rate", y_label="", last_step=last_step)),
        (
            "Throughput",
            line_chart(
                speed, name="speed", y_label="samples/s", last_step=last_step, y_from_0=True
            ),
        ),
    ]
    # Our own drawing of numbers: nothing in it to escape.
    return [(title, Markup(svg)) for title, svg in drawn if svg]


def _recall_chart(
    evaluations: Sequence[Event], last_step: int, clock: tuple[list[int], list[float]]
) -> str:
    if not evaluations:
        return ""
    lines = [
        Series(
            label=f"R@{k}, {DIRECTIONS[direction].lower()}",
            x=[event["step"] for event in evaluations],
            y=[event[direction][f"recall_at_{k}"] for event in evaluations],
            colour=colour,
            dashed=direction == "video_to_text",
            markers=True,
        )
        for colour, k in enumerate((1, 5, 10))
        for direction in DIRECTIONS
    ]
    return line_chart(
        lines, name="recall", y_label="%", last_step=last_step, y_from_0=True, minutes=clock
    )


def _shown_query(query: Event, thumbnails: Thumbnails | None) -> dict[str, Any]:
    clips = [
        {
            "key": clip["key"],
            "similarity": f"{clip['similarity']:.3f}",
            "is_right": clip["key"] == query["key"],
            "place": f"{place}.",
            "strip": _strip(clip["key"], thumbnails),
        }
        for place, clip in enumerate(query["top"], start=1)
    ]
    if not any(clip["is_right"] for clip in clips):
        missed = {"key": query["key"], "similarity": "", "is_right": True}
        clips.append({**missed, "place": "right:", "strip": _strip(query["key"], thumbnails)})
    level = "first" if query["rank"] == 1 else "near" if query["rank"] <= 5 else "far"
    return {"caption": query["caption"], "rank": query["rank"], "level": level, "clips": clips}


def _strip(key: str, thumbnails: Thumbnails | None) -> str | None:
    """The clip's frames side by side, as a data URL; None without frames."""
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
