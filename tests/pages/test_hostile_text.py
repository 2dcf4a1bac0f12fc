"""Text from data is shown as text on every page: it adds no element, attribute or script."""

from __future__ import annotations

import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from builders.html_page import Page
from builders.run_logs import evaluation_event, query, save_event, step_event, write_run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jinja2 import Template

from tvr.data_prep.check import stats_page
from tvr.data_prep.check.check_shard import Problem
from tvr.data_prep.check.stats_page import ShownSample
from tvr.data_prep.html_page import HIDDEN, page_template, shown_text
from tvr.trainer.pages import dashboard, report
from tvr.trainer.pages.dashboard import write_dashboard
from tvr.trainer.pages.report import write_report

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)>",
    "' onmouseover='alert(1)",
    "</title><base href=//x>",
    "{{ config }}{% raw %}",
    "&lt;b&gt;&#60;",
    "\u202egpj.exe\u2066",
    "a\x00b\x1b[2Jc\rd\x85\u2028\u2029",
    "half \ud83d of a pair \udfff",
    "\ufffe\uffff\ufdd0",
    "]]>--></style></textarea>",
    "javascript:alert(1)",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
)
PIECES = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8)), max_size=4)
CHARACTERS = st.text(st.characters(codec=None), max_size=12)
TEXTS = st.one_of(PIECES.map("".join), CHARACTERS)


compiled_once = cache(page_template)


class Structure(HTMLParser):
    """The elements of a page with the names of their attributes, its comments, and its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts: list[Any] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # Values that are not text of the data must be equal, too.
        fixed = [(name, value) for name, value in attrs if name in ("class", "id", "type", "src")]
        self.parts.append((tag, [name for name, _ in attrs], fixed))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.parts.append(f"/{tag}")
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data

    def handle_comment(self, data: str) -> None:
        self.parts.append(("comment", data))

    def handle_decl(self, decl: str) -> None:
        self.parts.append(("declaration", decl))

    def handle_pi(self, data: str) -> None:
        self.parts.append(("instruction", data))

    def unknown_decl(self, data: str) -> None:
        self.parts.append(("declaration", data))


@pytest.fixture(autouse=True)
def fast_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    # Megabytes of base64 that no data reaches.
    for module in (dashboard, report):
        monkeypatch.setattr(module, "plotly_library", lambda: "cGxvdGx5")
        monkeypatch.setattr(module, "page_template", compiled_once)


def hostile_run(folder: Path, text: str) -> Path:
    """A run whose captions, keys, reasons, settings and failure are this text."""
    bad = {"step": 2, "position": 7, "detail": text, "key": text, "reason": text}
    write_run(
        folder,
        step_event(1),
        step_event(2, loss=float("nan")),
        evaluation_event(2, queries=[]),
        {"event": "replaced", **bad},
        {"event": "left_out", **bad},
        save_event(2, error=text),
    )
    config = json.loads((folder / "config.json").read_text())
    config["data"]["train"] = text
    (folder / "config.json").write_text(json.dumps(config))
    final = evaluation_event(4, data=text, queries=[query(1, text, text), query(9, text, text)])
    (folder / "evaluation.json").write_text(json.dumps(final))
    return folder


def pages_of(folder: Path, text: str) -> list[str]:
    """The report, the dashboard of two runs, and the page about a data set."""
    run = hostile_run(folder / "run", text)
    other = hostile_run(folder / "other", f"{text}2")
    write_dashboard([run, other], folder / "dashboard.html")
    pages = [write_report(run), folder / "dashboard.html"]
    return [path.read_text() for path in pages]


def check_pages(pages: list[str], plain: list[str], text: str) -> None:
    for page, expected in zip(pages, plain, strict=True):
        found, wanted = Structure(page), Structure(expected)
        assert found.parts == wanted.parts
        for script, unchanged in zip(found.scripts, wanted.scripts, strict=True):
            if script.startswith("{"):  # data; nothing in it can end or open a script
                assert not re.search("[<>&']", script)
                json.loads(script, parse_constant=lambda name: pytest.fail(name))
            else:
                assert script == unchanged
        assert HIDDEN.search(page) is None
    report_text = Page(pages[0]).text
    assert report_text.count(shown_text(text)) >= 2


@pytest.fixture
def plain(tmp_path: Path) -> list[str]:
    return pages_of(tmp_path, "plain")


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=TEXTS)
@example(text=HOSTILE[0])
@example(text="".join(HOSTILE))
def test_hostile_text_adds_nothing_to_a_page(text: str, tmp_path: Path, plain: list[str]) -> None:
    check_pages(pages_of(tmp_path, text), plain, text)


@pytest.mark.parametrize("text", HOSTILE)
def test_known_attacks_are_shown_as_text(text: str, tmp_path: Path, plain: list[str]) -> None:
    check_pages(pages_of(tmp_path, text), plain, text)


@cache
def samples_template() -> Template:
    folder = Path(stats_page.__file__).parent
    environment = page_template(folder, "stats.html.jinja").environment
    source = (folder / "stats.html.jinja").read_text()
    start, end = source.index("{% if leaks %}"), source.index("<h2>Distributions</h2>")
    return environment.from_string(source[start:end])


def data_set_page(text: str) -> str:
    """The part of `tvr stats`'s page that shows text of the data, rendered by its template."""
    return samples_template().render(
        leaks={text: [Problem(where=text, what=text)]},
        max_leaks=5,
        shown=[
            ShownSample(key=text, captions=(text, text), pictures="data:x", problem=f"no {text}")
        ],
    )


@settings(deadline=None)
@given(TEXTS)
def test_the_page_about_a_data_set_shows_text_as_text(text: str) -> None:
    page = data_set_page(text)
    assert Structure(page).parts == Structure(data_set_page("plain")).parts
    assert Page(page).text.count(shown_text(text)) >= 4
    assert HIDDEN.search(page) is None


@given(CHARACTERS)
def test_visible_text_can_be_written_and_is_unchanged(text: str) -> None:
    shown = shown_text(text)
    shown.encode()
    assert shown_text(shown) == shown
    assert shown == text or HIDDEN.search(text)


def test_a_run_folder_may_have_any_name(tmp_path: Path) -> None:
    name = b"\xff<script>\xe2\x80\xae".decode(errors="surrogateescape")
    run = hostile_run(tmp_path / name, "plain")
    html = write_report(run).read_text()
    assert "\\udcff<script>\\u202e" in Page(html).text
    assert "<script>\u202e" not in html
