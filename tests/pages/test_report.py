"""The report: what it shows, what it escapes, what it tolerates, and that it needs nothing else."""

from __future__ import annotations

import base64
import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.html_page import Page, assert_self_contained
from builders.run_logs import evaluation_event, query, step_event
from PIL import Image

from tvr.trainer.monitoring.run_log import read_log
from tvr.trainer.pages.plots import Series, line_chart, running_mean
from tvr.trainer.pages.report import choose_queries, write_report


def write_report_run(
    folder: Path, events: list[dict[str, Any]], queries: list[dict[str, Any]]
) -> None:
    (folder / "config.json").write_text(json.dumps({"loss": {"margin": 0.2}}))
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if queries:
        final = evaluation_event(4, data="data/test", queries=queries)
        (folder / "evaluation.json").write_text(json.dumps(final))


def frames(key: str) -> list[Image.Image]:
    return [Image.new("RGB", (64, 48), shade) for shade in ("red", "blue", "green")]


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    replaced = {"event": "replaced", "step": 2, "position": 7, "detail": "truncated"}
    events = [
        step_event(1),
        step_event(2),
        evaluation_event(2),
        replaced | {"key": "bad-1", "reason": "unreadable"},
        replaced | {"key": "bad-2", "reason": "unreadable"},
        replaced | {"key": "bad-3", "reason": "no_frames"},
        {"event": "something new", "value": 1},
        {"event": "resumed", "step": 2},
        step_event(3),
        step_event(4),
        evaluation_event(4),
        *(
            replaced | {"event": "left_out", "key": "bad-4", "reason": "odd", "step": n}
            for n in (2, 4)
        ),
    ]
    write_report_run(
        tmp_path, events, [query(1, "a hit"), query(3, "a near miss"), query(37, "a miss")]
    )
    return tmp_path


def test_shows_results_curves_queries_and_settings(full_run: Path) -> None:
    path = write_report(full_run, thumbnails=frames)
    assert path == full_run / "report.html"
    page = Page(path.read_text())
    for wanted in ("51.2 %", "88.5 %", "42.5", "66.5", "chance 50 %", "200 test videos", "2.35"):
        assert wanted in page.text, wanted
    for wanted in ("Loss", "Recall on the test clips", "Learning rate", "Throughput", "minutes"):
        assert wanted in page.text, wanted
    for wanted in ("a hit", "rank 1", "a near miss", "rank 3", "a miss", "rank 37", "data/test"):
        assert wanted in page.text, wanted
    for wanted in ("unreadable", "bad-1", "no_frames", '"margin": 0.2', "resumed at step", "torch"):
        assert wanted in page.text, wanted
    assert re.search(r"Clips that evaluations left out.*odd\s*1\s*bad-4", page.text, re.DOTALL)
    assert len(page.named("svg")) == 4


def test_marks_the_right_clip_of_every_query(full_run: Path) -> None:
    page = Page(write_report(full_run, thumbnails=frames).read_text())
    figures = page.named("figure")
    # Five for each query, and the right one after the five that miss it.
    assert len(figures) == 16
    right = [index for index, figure in enumerate(figures) if "right" in str(figure["class"])]
    assert right == [0, 7, 15]
    assert all(figures[index]["title"] == "right" for index in right)
    assert "missed" in str(figures[15]["class"])
    assert page.text.count("\u2713") == 3


def test_thumbnails_are_strips_inside_the_page(full_run: Path) -> None:
    page = Page(write_report(full_run, thumbnails=frames).read_text())
    source = page.named("img")[0]["src"]
    assert source is not None
    kind, _, data = source.partition(",")
    assert kind == "data:image/jpeg;base64"
    strip = Image.open(BytesIO(base64.b64decode(data)))
    assert strip.size == (3 * 64 + 2, 48)
    red, _, blue, *_ = strip.getpixel((5, 5)) + strip.getpixel((64 + 10, 5))[2:]  # type: ignore[operator]
    assert red > 200
    assert blue < 100


@pytest.mark.parametrize("thumbnails", [None, lambda key: []])
def test_without_thumbnails_clips_are_named(full_run: Path, thumbnails: Any) -> None:
    page = Page(write_report(full_run, thumbnails=thumbnails).read_text())
    assert page.named("img") == []
    assert "clip-4" in page.text


def test_needs_nothing_from_outside(full_run: Path) -> None:
    assert_self_contained(write_report(full_run, thumbnails=frames).read_text())


def test_escapes_everything_from_the_data(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    events = [
        step_event(1),
        {"event": "replaced", "step": 1, "position": 1, "key": evil, "reason": evil},
    ]
    write_report_run(tmp_path, events, [query(1, evil, key=evil), query(9, evil, key=evil)])
    (tmp_path / "config.json").write_text(json.dumps({"name": evil}))
    html = write_report(tmp_path, thumbnails=None).read_text()
    assert "<script" not in html
    assert Page(html).text.count("alert") >= 5


def test_says_so_before_the_first_evaluation_and_step(tmp_path: Path) -> None:
    write_report_run(tmp_path, [], [])
    text = Page(write_report(tmp_path).read_text()).text
    assert "no evaluation yet" in text
    assert "No step was logged yet" in text
    assert "None: training read every sample" in text
    write_report_run(tmp_path, [step_event(1, tpm_cl_loss=None)], [])
    text = Page(write_report(tmp_path).read_text()).text
    assert "no evaluation yet" in text
    assert "TPM-CL" not in text


def test_falls_back_on_the_logged_evaluation(tmp_path: Path) -> None:
    write_report_run(tmp_path, [step_event(1), evaluation_event(1, binding_accuracy=None)], [])
    text = Page(write_report(tmp_path).read_text()).text
    assert "51.2 %" in text
    assert "inding accuracy" not in text
    assert "Test queries" not in text


@pytest.mark.parametrize("missing", ["config.json", "log.jsonl"])
def test_missing_file_is_named(full_run: Path, missing: str) -> None:
    (full_run / missing).unlink()
    with pytest.raises(ValueError, match=rf"{missing} is missing: give the run_dir"):
        write_report(full_run)


def test_torn_lines_are_counted_and_shown(full_run: Path) -> None:
    with (full_run / "log.jsonl").open("a") as log:
        log.write('3\n\n{"event": "step", "st')
    assert read_log((full_run / "log.jsonl").read_text()).unreadable_lines == 2
    assert "2 lines of log.jsonl" in Page(write_report(full_run).read_text()).text


def test_a_resumed_run_counts_each_step_once_and_its_time_on() -> None:
    events = [step_event(1), step_event(2), step_event(3), {"event": "resumed", "step": 1}]
    events += [
        step_event(2, time_s=10.0, loss=9.0),
        step_event(3, time_s=20.0),
        step_event(4, time_s=30.0),
    ]
    log = read_log("\n".join(json.dumps(event) for event in events))
    assert [event["step"] for event in log.steps] == [1, 2, 3, 4]
    assert log.steps[1]["loss"] == 9.0
    assert [event["elapsed_s"] for event in log.steps] == [60.0, 190.0, 200.0, 210.0]
    assert log.resumed_at == [1]
    slow = {"event": "resumed", "step": 1, "time_s": 90.0}  # to start took longer than step 1
    log = read_log("\n".join(map(json.dumps, [step_event(1), slow, step_event(2, time_s=100.0)])))
    assert [event["elapsed_s"] for event in log.steps] == [60.0, 160.0]


def test_chooses_hits_near_misses_and_the_worst() -> None:
    ranks = [1] * 50 + [2, 3, 4, 5] * 5 + list(range(6, 30))
    queries = [query(rank, f"{index:03d}", key=f"clip {index}") for index, rank in enumerate(ranks)]
    chosen = [entry["rank"] for entry in choose_queries(queries, 12)]
    assert chosen[:6] == [1] * 6
    assert all(1 < rank <= 5 for rank in chosen[6:9])
    assert chosen[9:] == [27, 28, 29]
    captions = [entry["caption"] for entry in choose_queries(queries, 12)]
    assert len(set(captions)) == 12
    assert captions == [entry["caption"] for entry in choose_queries(queries[::-1], 12)]


def test_a_clip_with_many_captions_is_shown_once_per_group() -> None:
    queries = [query(rank, f"{index}") for index, rank in enumerate([1, 1, 1, 2, 3, 9, 40])]
    assert [entry["rank"] for entry in choose_queries(queries, 12)] == [1, 2, 40]


@pytest.mark.parametrize(("ranks", "count"), [([1] * 30, 12), ([40] * 30, 12), ([1, 2, 9], 3)])
def test_a_short_group_leaves_its_place_to_others(ranks: list[int], count: int) -> None:
    queries = [query(rank, f"{index:03d}", key=f"clip {index}") for index, rank in enumerate(ranks)]
    captions = [entry["caption"] for entry in choose_queries(queries, 12)]
    assert len(captions) == len(set(captions)) == count


def test_running_mean_is_centred_and_skips_what_is_not_finite() -> None:
    assert running_mean([1.0, 2.0, 6.0], 3).tolist() == [1.5, 3.0, 4.0]
    assert running_mean([1.0, float("nan"), 3.0], 3).tolist() == [1.0, 2.0, 3.0]
    assert running_mean([5.0], 9).tolist() == [5.0]
    assert np.isnan(running_mean([float("inf")], 1)).all()


@pytest.mark.parametrize(("first", "is_log"), [(2.0, False), (500.0, True), (-500.0, False)])
def test_a_loss_that_starts_far_up_gets_a_log_axis(first: float, is_log: bool) -> None:
    line = Series(label="loss", x=[1, 2, 3], y=[first, 2.0, 1.0], colour=0)
    chart = line_chart([line], name="loss", y_label="loss", last_step=3, log_if_wide=True)
    assert ("log scale" in chart) == is_log


def test_a_long_run_makes_no_larger_chart() -> None:
    def chart(length: int) -> str:
        steps = list(range(1, length + 1))
        noise = np.random.default_rng(0).normal(size=length).tolist()
        line = Series(label="loss", x=steps, y=noise, colour=0, smooth=True)
        return line_chart([line], name="loss", y_label="loss", last_step=length)

    assert len(chart(100_000)) < 3 * len(chart(800))
    assert chart(50) == chart(50)
