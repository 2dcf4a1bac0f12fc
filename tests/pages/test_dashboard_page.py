"""The dashboard of real runs in a real browser: it draws the values of the log, follows a resumed
run, and requests nothing from outside."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from builders import jobs
from builders.browser import Browser, Tab, chromium
from builders.html_page import Page
from builders.run_logs import step_event, write_run
from builders.tiny import tiny_config

from tvr.trainer.loop import train
from tvr.trainer.monitoring.step_record import ALL_PARTS
from tvr.trainer.pages import dashboard
from tvr.trainer.pages.dashboard import write_dashboard

STEPS, PREEMPTED_AFTER = 40, 12

# Every drawn line: the coordinates of its SVG path, mapped back through the axes to values. A value
# of y is an interval, since paths are rounded to a hundredth of a pixel.
DRAWN = """
[...document.querySelectorAll(".panel")].flatMap((panel) => {
  const plot = panel.querySelector(".chart"), { xaxis, yaxis } = plot._fullLayout;
  const traces = [...panel.querySelectorAll("g.trace.scatter")];
  return traces.filter((trace) => trace.querySelector("path.js-line")).map((trace) => {
    const of = plot._fullData.find((data) => trace.classList.contains(`trace${data.uid}`));
    const path = trace.querySelector("path.js-line").getAttribute("d");
    const points = path.match(/-?[\\d.]+,-?[\\d.]+/g).map((point) => point.split(",").map(Number));
    return {
      panel: panel.id, run: of.meta.run, label: of.meta.label,
      colour: trace.querySelector("path.js-line").style.stroke,
      x: points.map(([x]) => Math.round(xaxis.p2d(x))),
      y: points.map(([, y]) => [yaxis.p2d(y + 0.02), yaxis.p2d(y - 0.02)]),
    };
  });
})
"""


@dataclass
class Line:
    panel: str
    run: int
    label: str
    colour: str
    x: list[int]
    y: list[tuple[float, float]]


@dataclass
class ResumedPage:
    """A page that stayed open while its run was resumed, and its lines before and after."""

    run_dir: Path
    page: Path
    tab: Tab
    before: list[Line]
    after: list[Line]
    scrolled: float
    """Vertical scroll position after the update."""
    is_same_page: bool
    state: str
    requested: list[str]
    errors: list[Any]


def drawn(tab: Tab) -> list[Line]:
    return [Line(**line) for line in tab.value(DRAWN)]


def shown(browser: Browser, page: Path) -> Tab:
    """Opens a page and waits until its charts are drawn."""
    tab = browser.open(page)
    tab.wait_for("document.body && document.body.dataset.drawn")
    return tab


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def resumed(browser: Browser, data: Path, tmp_path_factory: pytest.TempPathFactory) -> ResumedPage:
    run_dir = tmp_path_factory.mktemp("runs") / "resumed"
    page = run_dir / "dashboard.html"
    config = tiny_config(data, train={"steps": STEPS, "eval_every": 10}, checkpoint={"every": 10})
    settings = jobs.write_settings(config, run_dir, 2)
    stop = jobs.stop_rank_after(PREEMPTED_AFTER, run_dir)
    assert jobs.run_forked(settings, run_dir, 2, stop) == [75, 75]
    write_dashboard([run_dir], page)
    tab = shown(browser, page)
    before = drawn(tab)
    tab.value("window.mark = 'the page that was opened'; window.scrollTo(0, 400)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dashboard, "WATCH_EVERY_S", 0.5)
        watcher = threading.Thread(target=dashboard.watch, args=([run_dir], page))
        watcher.start()
        assert jobs.run_forked(settings, run_dir, 2) == [0, 0]
        watcher.join(timeout=60)
    last = tab.wait_for(
        "content.runs[0].state === 'finished' && document.body.dataset.drawn == content.written"
        " && [window.mark, window.scrollY, document.querySelector('.state').textContent]"
    )
    return ResumedPage(
        run_dir=run_dir,
        page=page,
        tab=tab,
        before=before,
        after=drawn(tab),
        scrolled=last[1],
        is_same_page=last[0] == "the page that was opened",
        state=last[2],
        requested=tab.requested(),
        errors=tab.errors(),
    )


@pytest.fixture(scope="module")
def other(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank with another learning rate."""
    run_dir = tmp_path_factory.mktemp("others") / "other"
    rate = {"steps": 12, "learning_rate": 5e-3}
    train(tiny_config(data, train=rate, data={"test": None, "test_exchanged": None}), run_dir)
    return run_dir


def field(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda event: event[key]


def recall(direction: str, k: int) -> Callable[[dict[str, Any]], Any]:
    return lambda event: event[direction][f"recall_at_{k}"] / 100


# (panel, label): kind of the log events that hold the values, and how to read a value from one.
EXPECTED_LINES: dict[tuple[str, str], tuple[str, Callable[[dict[str, Any]], Any]]] = {
    ("tvr_train_loss", "total"): ("step", field("loss")),
    ("tvr_train_loss", "similarity"): ("step", field("similarity_loss")),
    ("tvr_train_loss", "tpm cl"): ("step", field("tpm_cl_loss")),
    ("tvr_train_loss", "penalty"): ("step", field("penalty")),
    ("tvr_train_learning_rate", "heads"): ("step", field("learning_rate")),
    ("tvr_train_learning_rate", "towers"): ("step", field("encoder_learning_rate")),
    ("tvr_train_gradient_norm", ""): ("step", field("gradient_norm")),
    ("tvr_train_pairs_per_second", ""): ("step", field("samples_per_s")),
    ("tvr_train_step_seconds", ""): ("step", field("step_s")),
    ("tvr_data_wait_seconds_total", ""): ("step", field("data_wait_s")),
    ("tvr_train_hard_negatives_per_row", ""): ("step", field("hard_negatives_per_row")),
    ("tvr_train_equal_captions_per_row", ""): ("step", field("equal_captions_per_row")),
    ("tvr_train_temperature", ""): ("step", lambda event: 0.01),
    ("tvr_train_goodput_ratio", ""): ("step", field("goodput")),
    ("tvr_train_straggler_gap_seconds_total", ""): ("step", field("straggler_gap_s")),
    ("tvr_train_positive_similarity", "positive similarity"): (
        "step",
        field("positive_similarity"),
    ),
    ("tvr_train_positive_similarity", "hardest negative similarity"): (
        "step",
        field("hardest_similarity"),
    ),
    ("tvr_host_memory_bytes", ""): ("step", field("host_memory_bytes")),
    ("tvr_checkpoint_seconds", ""): ("saved", field("seconds")),
    ("tvr_checkpoint_held_up_seconds", ""): ("saved", field("held_up_s")),
    ("tvr_checkpoint_bytes", ""): ("saved", field("num_bytes")),
    ("tvr_evaluation_binding_accuracy_ratio", ""): (
        "evaluation",
        lambda event: event["binding_accuracy"] / 100,
    ),
    **{
        (f"tvr_evaluation_recall_ratio-{direction}", f"k = {k}"): (
            "evaluation",
            recall(direction, k),
        )
        for direction in ("text_to_video", "video_to_text")
        for k in (1, 5, 10)
    },
}


def assert_drawn(lines: list[Line], run_dir: Path, *, run: int = 0, until: int = STEPS) -> None:
    found = {(line.panel, line.label): line for line in lines if line.run == run}
    for name, (kind, value) in EXPECTED_LINES.items():
        events = [event for event in jobs.events(run_dir, kind) if event["step"] <= until]
        # The first step after a start has no straggler gap.
        events = [event for event in events if value(event) is not None]
        assert (name in found) == bool(events), name
        if not events:
            continue
        line = found[name]
        assert line.x == [event["step"] for event in events], name
        for event, (least, most) in zip(events, line.y, strict=True):
            assert least <= value(event) <= most, (name, event["step"])


def test_lines_hold_the_values_of_the_log(resumed: ResumedPage) -> None:
    assert_drawn(resumed.after, resumed.run_dir)
    assert resumed.state == "finished"
    assert resumed.errors == []


def test_the_parts_of_a_step_are_stacked(resumed: ResumedPage) -> None:
    lines = [line for line in resumed.after if line.panel == "tvr_train_part_seconds_total-0"]
    assert [line.label for line in lines] == list(ALL_PARTS)
    events = jobs.events(resumed.run_dir, "step")
    for place, line in enumerate(lines):
        assert line.x == [event["step"] for event in events]
        for event, (least, most) in zip(events, line.y, strict=True):
            below = sum(event["parts_s"].get(part, 0.0) for part in ALL_PARTS[: place + 1])
            assert least <= below <= most, (line.label, event["step"])


def test_an_open_page_adds_the_new_points(resumed: ResumedPage) -> None:
    left = jobs.events(resumed.run_dir, "preempted")[0]["step"]
    assert PREEMPTED_AFTER <= left < STEPS
    assert_drawn(resumed.before, resumed.run_dir, until=left)
    (total,) = [line for line in resumed.after if line.label == "total"]
    assert total.x == list(range(1, STEPS + 1))
    assert resumed.is_same_page
    assert resumed.scrolled == 400


def test_restarts_are_marked_on_the_axis(resumed: ResumedPage) -> None:
    left = jobs.events(resumed.run_dir, "preempted")[0]["step"]
    for panel in ("tvr_train_loss", "tvr_checkpoint_bytes"):
        at = f"document.getElementById('{panel}').querySelector('.chart')"
        (line,) = resumed.tab.value(
            f"[...{at}.querySelectorAll('.shapelayer path')].map((path) => {at}._fullLayout.xaxis"
            ".p2d(Number(path.getAttribute('d').match(/^M([\\d.]+)/)[1])"
            f" - {at}._fullLayout._size.l))"
        )
        assert line == pytest.approx(left, abs=0.1)
        assert "\u23cf\u21bb" in resumed.tab.value(f"{at}.querySelector('.annotation').textContent")


def test_the_page_requests_nothing_from_outside(resumed: ResumedPage) -> None:
    assert len(resumed.requested) > 1  # the page requests itself again for new values
    assert {address.partition("?")[0] for address in resumed.requested} == {resumed.page.as_uri()}
    html = resumed.page.read_text()
    page = Page(html)
    assert not {"link", "iframe", "object", "base", "img"} & {tag for tag, _ in page.tags}
    assert not any("src" in attributes for _, attributes in page.tags)
    (policy,) = [meta["content"] for meta in page.named("meta") if "http-equiv" in meta]
    assert str(policy).startswith("default-src 'none';")
    assert not re.findall(r"https?:", html)


def test_runs_share_the_panels(
    resumed: ResumedPage, other: Path, browser: Browser, tmp_path: Path
) -> None:
    write_dashboard([resumed.run_dir, other], tmp_path / "both.html")
    tab = shown(browser, tmp_path / "both.html")
    lines = drawn(tab)
    assert_drawn(lines, resumed.run_dir, run=0)
    assert_drawn(lines, other, run=1)
    losses = [line for line in lines if line.panel == "tvr_train_loss"]
    colours = [{line.colour for line in losses if line.run == run} for run in (0, 1)]
    assert len(colours[0]) == len(colours[1]) == 1
    assert colours[0] != colours[1]
    text = tab.value("document.getElementById('runs').innerText")
    for wanted in (
        resumed.run_dir.name,
        other.name,
        "train.learning_rate",
        "0.005",
        "Settings that",
    ):
        assert wanted in text
    legend = tab.value("document.querySelector('#tvr_train_loss .legend').innerText")
    for run_dir in (resumed.run_dir, other):
        assert f"{jobs.losses(run_dir)[-1]:.4g}" in legend
    tab.value("document.querySelector('#runs button').click()")
    tab.wait_for("document.querySelectorAll('#tvr_train_step_seconds g.trace').length === 1")
    tab.wait_for("document.querySelectorAll('#tvr_checkpoint_bytes g.trace').length === 1")
    assert (
        tab.value("document.querySelector('#runs button').getAttribute('aria-pressed')") == "false"
    )


def test_keys_and_pointer_show_the_values_of_a_step(resumed: ResumedPage) -> None:
    tab = resumed.tab
    tab.call("Page.bringToFront")
    losses = jobs.losses(resumed.run_dir)
    chart = "document.querySelector('#tvr_train_loss .chart')"
    assert f"total{losses[-1]:.4g}" in tab.value(f"{chart}.getAttribute('aria-label')")
    tab.value(f"{chart}.focus()")
    for key in ("Home", "ArrowRight", "ArrowRight"):
        tab.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    announced = tab.value("document.getElementById('announced').textContent")
    assert announced.startswith("step 3: ")
    assert f"total{losses[2]:.4g}" in announced
    third = jobs.events(resumed.run_dir, "step")[2]["hard_negatives_per_row"]
    other_legend = "document.querySelector('#tvr_train_hard_negatives_per_row .legend').innerText"
    assert f"{third:.4g}" in tab.value(other_legend)
    box = tab.value(f"(({{left, top}}) => [left, top])({chart}.getBoundingClientRect())")
    at = tab.value(f"{chart}._fullLayout.xaxis._offset + {chart}._fullLayout.xaxis.d2p(20)")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + at, y=box[1] + 100)
    tab.wait_for(f"{chart}.querySelector('.cursor').dataset.at === 'step 20'")
    assert f"total{losses[19]:.4g}" in tab.value("byId('tvr_train_loss').innerText")


def test_time_axis_and_smoothing_beside_the_raw_values(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", *(step_event(n, loss=float(n % 2)) for n in range(1, 101)))
    write_dashboard([run], tmp_path / "page.html")
    tab = shown(browser, tmp_path / "page.html")
    raw, smooth = [line for line in drawn(tab) if line.label == "total"]
    assert [round(sum(y) / 2) for y in raw.y] == [n % 2 for n in range(1, 101)]
    assert all(0.1 < sum(y) / 2 < 0.9 for y in smooth.y[50:])
    tab.value("byId('x').value = 'time'; byId('x').dispatchEvent(new Event('change'))")
    tab.wait_for(
        "document.querySelector('#tvr_train_loss .xtick text').textContent.includes('min')"
    )
    tab.wait_for(
        "document.querySelector('#tvr_train_loss').querySelector('.chart').data[0].x[99]===100"
    )


def test_colours_follow_the_scheme_of_the_reader(resumed: ResumedPage) -> None:
    def colours() -> list[str]:
        paper = "getComputedStyle(document.querySelector('.panel')).backgroundColor"
        return [resumed.tab.value(paper), *(line.colour for line in drawn(resumed.tab)[:4])]

    resumed.tab.call("Page.bringToFront")  # a hidden tab applies the scheme when it is shown
    light = colours()
    resumed.tab.value("delete document.body.dataset.drawn")
    resumed.tab.prefer("dark")
    resumed.tab.wait_for("document.body.dataset.drawn")
    dark = colours()
    assert len(set(light)) == len(set(dark)) == 5
    assert not set(light) & set(dark)


def test_text_of_a_run_stays_text(browser: Browser, tmp_path: Path) -> None:
    evil = "</script><script>window.evil = 1</script><img src=x onerror='window.evil = 2'>"
    runs = [
        write_run(tmp_path / name, step_event(1), model={"tokenizer": evil + name})
        for name in ("<b onclick=evil()>bold", "<script>window.evil=3")
    ]
    (runs[0] / "failures").mkdir()
    failure = {"rank": 1, "host": evil, "code": 3, "error": evil}
    (runs[0] / "failures" / "1.json").write_text(json.dumps(failure))
    write_dashboard(runs, tmp_path / "page.html")
    tab = shown(browser, tmp_path / "page.html")
    text = tab.value("document.body.innerText")
    assert text.count(evil) >= 4
    assert "<b onclick=evil()>bold" in text
    assert tab.value("window.evil") is None
    assert tab.value("document.querySelectorAll('img, main b[onclick]').length") == 0
    assert evil not in (tmp_path / "page.html").read_text()
    assert tab.errors() == []
