"""The report: its content, its escapes, the incomplete runs it accepts, and its independence."""

from __future__ import annotations

import base64
import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from builders.browser import chromium
from builders.html_page import Page
from builders.run_logs import evaluation_event, query, step_event, write_run
from PIL import Image

from tvr.trainer.monitoring.run_log import read_log
from tvr.trainer.pages.report import choose_queries, write_report


def write_report_run(
    folder: Path, events: list[dict[str, Any]], queries: list[dict[str, Any]]
) -> None:
    write_run(folder, *events, loss={"margin": 0.2})
    if queries:
        final = evaluation_event(4, data="data/test", queries=queries)
        (folder / "evaluation.json").write_text(json.dumps(final))


def chart_data(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', html)
    assert found is not None
    return json.loads(found[1])


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
    for wanted in ("a hit", "rank 1", "a near miss", "rank 3", "a miss", "rank 37", "data/test"):
        assert wanted in page.text, wanted
    for wanted in ("unreadable", "bad-1", "no_frames", '"margin": 0.2', "resumed at step", "torch"):
        assert wanted in page.text, wanted
    assert re.search(r"Clips that evaluations left out.*odd\s*1\s*bad-4", page.text, re.DOTALL)


def test_draws_panels_of_the_dashboard(full_run: Path) -> None:
    (group,) = chart_data(write_report(full_run).read_text())["groups"]
    found = {panel["id"]: panel for panel in group["panels"]}
    assert list(found) == [
        "tvr_train_loss",
        "tvr_evaluation_recall_ratio-text_to_video",
        "tvr_evaluation_recall_ratio-video_to_text",
        "tvr_train_learning_rate",
        "tvr_train_pairs_per_second",
    ]
    total = found["tvr_train_loss"]["lines"][0]
    assert (total["label"], total["x"]) == ("total", [1, 2, 3, 4])
    assert total["y"] == pytest.approx([4.0, 2.0, 4 / 3, 1.0], rel=1e-6)
    recall = found["tvr_evaluation_recall_ratio-video_to_text"]["lines"][0]
    assert (recall["label"], recall["x"], recall["y"]) == ("k = 1", [2, 4], [0.425, 0.425])


def test_a_browser_draws_the_curves_and_requests_nothing_else(
    full_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_report(full_run, thumbnails=frames)
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        tab = browser.open(path)
        tab.wait_for("document.body && document.body.dataset.drawn")
        panels = "[...document.querySelectorAll('.panel')]"
        drawn = f"{panels}.map((panel) => panel.querySelectorAll('path.js-line').length)"
        assert tab.value(drawn) == [4, 3, 3, 2, 1]
        assert tab.errors() == []
        others = [url for url in tab.requested() if not url.startswith(("data:", "blob:"))]
        assert others == [path.as_uri()]


def test_marks_the_right_clip_of_every_query(full_run: Path) -> None:
    page = Page(write_report(full_run, thumbnails=frames).read_text())
    figures = page.named("figure")
    # Five figures a query, and a sixth for the query whose clip is not among the five.
    assert len(figures) == 16
    right = [index for index, figure in enumerate(figures) if "right" in str(figure["class"])]
    assert right == [0, 7, 15]
    assert all(figures[index]["title"] == "right" for index in right)
    assert "missed" in str(figures[15]["class"])
    assert page.text.count("\u2713") == 3


def test_shows_five_clips_of_a_query_that_has_more(tmp_path: Path) -> None:
    many = query(1, "a hit")
    many["top"] = [{**many["top"][0], "key": f"{n}"} for n in range(30)]
    write_report_run(tmp_path, [step_event(1), evaluation_event(1)], [many])
    page = Page(write_report(tmp_path).read_text())
    # And the right one, which is not among them.
    assert len(page.named("figure")) == 6


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


def test_refers_to_nothing_outside(full_run: Path) -> None:
    page = Page(write_report(full_run, thumbnails=frames).read_text())
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not any("src" in script for script in page.named("script"))
    assert all(
        str(image["src"]).startswith("data:image/jpeg;base64,") for image in page.named("img")
    )
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    policy = page.named("meta")[2]["content"]
    assert str(policy).startswith("default-src 'none';")


def test_escapes_everything_from_the_data(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    events = [
        step_event(1),
        {"event": "replaced", "step": 1, "position": 1, "key": evil, "reason": evil},
    ]
    write_report_run(tmp_path, events, [query(1, evil, key=evil), query(9, evil, key=evil)])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"name": evil}))
    html = write_report(tmp_path, thumbnails=None).read_text()
    # The data, the code and the library of the charts.
    assert len(Page(html).named("script")) == html.count("<script") == 3
    assert evil not in html
    assert Page(html).text.count("alert") >= 5


def test_reports_a_run_before_the_first_evaluation_and_step(tmp_path: Path) -> None:
    write_report_run(tmp_path, [], [])
    text = Page(write_report(tmp_path).read_text()).text
    assert "no evaluation yet" in text
    assert "The log has no step yet" in text
    assert "None: training could read every sample" in text
    write_report_run(tmp_path, [step_event(1, tpm_cl_loss=None)], [])
    html = write_report(tmp_path).read_text()
    assert "no evaluation yet" in Page(html).text
    loss = chart_data(html)["groups"][0]["panels"][0]
    assert loss["labels"] == ["total", "similarity", "penalty"]


def test_falls_back_to_the_logged_evaluation(tmp_path: Path) -> None:
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


def test_a_resumed_run_counts_each_step_once_and_adds_up_its_time() -> None:
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
    slow = {"event": "resumed", "step": 1, "time_s": 90.0}  # the start took longer than step 1
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
def test_other_groups_fill_the_places_of_a_short_group(ranks: list[int], count: int) -> None:
    queries = [query(rank, f"{index:03d}", key=f"clip {index}") for index, rank in enumerate(ranks)]
    captions = [entry["caption"] for entry in choose_queries(queries, 12)]
    assert len(captions) == len(set(captions)) == count


def test_every_metric_of_an_evaluation_is_in_the_table(tmp_path: Path) -> None:
    way = {"recall_at_1": 40.0, "recall_at_5": 50.0, "recall_at_10": 60.0, "recall_at_50": 70.25}
    way |= {"median_rank": 2.0, "mean_rank": 3.125, "mean_average_precision": 55.5}
    protocol = {"name": "multi_caption", "version": 2, "equal_captions": "wrong"}
    final = evaluation_event(4, data="data/test", text_to_video=way, mean=way)
    final["protocol"] = protocol | {"captions_with_equals": 12}
    final["rescored"] = {
        "dual_softmax": {"temperature": 0.01, "text_to_video": way | {"recall_at_1": 91.5}},
        "qb_norm": {
            "beta": 20.0,
            "bank": "data/<train>",
            "bank_captions": 5000,
            "dropped_test_captions": 3,
            "text_to_video": way | {"recall_at_1": 92.5},
        },
    }
    final["intervals"] = {"text_to_video": {"recall_at_1": [31.25, 48.75]}}
    write_run(tmp_path, step_event(4))
    (tmp_path / "evaluation.json").write_text(json.dumps(final))
    page = " ".join(write_report(tmp_path).read_text().split())
    interval = '<br><small class="muted">31.2 to 48.8</small>'
    assert page.count(interval) == 1
    assert page.index(interval) < page.index("Dual softmax")
    page = page.replace(interval, "")
    assert "its 95 % interval" in page
    assert "12 captions equal one of another video: only the own video is right." in page
    names = ["R@1", "R@5", "R@10", "R@50", "MdR", "MnR", "mAP"]
    assert "<th>Raw</th>" + "".join(f"<th>{name}</th>" for name in names) in page
    cells = ["40.0 %", "50.0 %", "60.0 %", "70.2 %", "2.0", "3.12", "55.5 %"]
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    assert f"<td>Text to video</td>{row}" in page
    assert f"<td>Mean of both</td>{row}" in page
    # The other direction is of an earlier release, which had no recall at 50.
    assert re.search(r"<td>Video to text</td>(<td>[^<]*</td>){3}<td>-</td>", page)
    assert "<span>R@1, text to video, raw</span>" in page
    # Each way of scoring has a table of its own, under its name.
    tables = page.split("<table>")[1:4]
    titles = [re.findall(r"<th>([^<]*)</th>", table)[0] for table in tables]
    assert titles == [
        "Raw",
        "Dual softmax, temperature 0.01: sees all test queries at once",
        "QB-Norm, beta 20, bank of 5,000 captions of data/&lt;train&gt;, 3 test captions dropped",
    ]
    shown = [re.findall(r"<td>(\d\d\.\d %)</td>", table)[0] for table in tables]
    assert shown == ["40.0 %", "91.5 %", "92.5 %"]
