"""The page of an explanation shows its choices, and text of a caption as text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.browser import chromium
from builders.heat_map import HeatMap
from builders.html_page import Page
from hypothesis import HealthCheck, example, given, settings
from test_hostile_text import HOSTILE, TEXTS, Structure, compiled_once

from tvr.data_prep.html_page import HIDDEN, shown_text
from tvr.trainer.explanation import hardest, page
from tvr.trainer.explanation.hardest import HardNegative, Movement, hardest_page
from tvr.trainer.explanation.page import explanation_page
from tvr.trainer.explanation.record import NOTHING, Explanation

FRAMES = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)


@pytest.fixture(autouse=True)
def fast_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hardest, page):
        monkeypatch.setattr(module, "page_template", compiled_once)


def explanation(**changes: Any) -> Explanation:
    """Three frames and four tokens; the numbers are those of the text below."""
    found = Explanation(
        caption="a red circle",
        model="a model",
        interaction="att_wti",
        words=("[start]", "red", "circle", "[end]"),
        is_special=(True, False, False, True),
        continues_word=(False, False, True, False),
        similarity=np.array(
            [[0.1, 0.2, 0.1], [0.5, 0.4, 0.3], [0.2, 0.9, 0.6], [-0.3, -0.2, -0.1]], np.float32
        ),
        best_frame=np.array([1, 0, 1, 2]),
        neighbour_frame=np.array([NOTHING, 2, 1]),
        neighbour_weight=np.array([0, 0.4, 0.4], np.float32),
        best_word=np.array([1, 2, 2]),
        word_weights=np.array([0.1, 0.2, 0.6, 0.1], np.float32),
        frame_weights=np.array([0.2, 0.5, 0.3], np.float32),
        word_terms=np.array([0.01, 0.05, 0.25, 0.0], np.float32),
        neighbour_terms=np.array([0, 0, 0.06, 0], np.float32),
        frame_terms=np.array([0.025, 0.11, 0.045], np.float32),
        sentence_similarity=np.array([0.3, 0.7, 0.5], np.float32),
        sentence_frame=1,
        sentence_term=0.225,
        sentence_neighbour_term=0.05,
        sentence_frame_terms=np.array([0.015, 0.09, 0.04], np.float32),
        masked_words=np.array([False, False, True, False]),
        masked_frames=np.array([False, True, False]),
        score=0.86,
        frame_times=np.array([0.5, 1.5, 75.25]),
    )
    return replace(found, **changes)


def test_the_choices_are_marked() -> None:
    found = explanation()
    html = explanation_page(found, FRAMES, title="v1")
    marks = HeatMap(html)
    assert [name for name, _ in marks.rows] == ["whole sentence", *found.words]
    assert marks.marked("whole sentence") == 1
    assert [marks.marked(word) for word in found.words] == found.best_frame.tolist()
    assert marks.marked("circle", "helps") == 2
    assert marks.marked("[end]", "helps") == 1
    assert "helps" not in set().union(*marks.rows[2][1])  # frame 1 has no neighbour
    text = Page(html).text
    assert "The similarity of 0.860 is a sum." in text
    assert "Of this sum, 0.110 come from neighbour frames." in text
    assert "adds most is \u201ccircle\u201d, with 0.250; its best frame is frame 2 at 1.5 s" in text
    assert "it would remove \u201ccircle\u201d from the caption and frame 2 from the video" in text
    assert "1:15.2" in text
    assert html.count("<s>") == 2  # the word, and the legend
    assert html.count('class="removed"') == 1
    assert len(Page(html).named("img")) == 3


def test_only_what_is_part_of_the_score_is_shown_as_part_of_it() -> None:
    nothing = np.zeros(3, np.float32)
    found = explanation(
        matching="words_to_frames",
        frame_weights=nothing,
        frame_terms=nothing,
        sentence_frame_terms=nothing,
        score=0.535,
    )
    assert list(found.parts) == ["sentence", "words"]
    html = explanation_page(found, FRAMES, title="v1")
    text = Page(html).text
    assert "The sentence's best frame gives 0.225. The words' best frames give 0.310." in text
    assert "counts no frame's best word" in text
    assert "best word of this frame" in explanation_page(explanation(), FRAMES, title="v1")
    for absent in ("best word</th>", "best word of this frame", "the frame chose", "or frames"):
        assert absent not in html, absent
    assert html.count('scope="row">weight') == html.count('scope="row">adds') == 0


def test_models_without_words_neighbours_or_predictors() -> None:
    html = explanation_page(
        explanation(
            interaction="wti",
            word_weights=np.zeros(4, np.float32),
            word_terms=np.zeros(4, np.float32),
            neighbour_frame=np.full(3, NOTHING),
            neighbour_weight=np.zeros(3, np.float32),
            masked_words=None,
            masked_frames=None,
            frame_times=np.full(3, np.nan),
            best_frame=np.array([1, 0, 1, NOTHING]),
            best_word=np.array([1, 2, NOTHING]),
        ),
        FRAMES,
        title="v1",
    )
    text = Page(html).text
    assert "does not read the words" in text
    assert "not read" in text
    assert "TPM-CL" not in text
    assert "nan" not in text
    assert "neighbour" not in text
    assert "best" not in set().union(*HeatMap(html).rows[4][1])


def test_pictures_must_fit() -> None:
    with pytest.raises(ValueError, match="2 pictures for an explanation of 3 frames"):
        explanation_page(explanation(), FRAMES[:2], title="v1")


def hostile_page(text: str) -> str:
    words = ("[start]", text or "-", text or "-", "[end]")
    found = explanation(caption=text, model=text, words=words)
    return explanation_page(found, FRAMES, title=text)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS)
@example("".join(HOSTILE))
def test_hostile_text_adds_nothing_to_the_page(text: str) -> None:
    page, plain = hostile_page(text), hostile_page("plain")
    assert Structure(page).parts == Structure(plain).parts
    assert HIDDEN.search(page) is None
    assert Page(page).text.count(shown_text(text)) >= 4
    assert "<script" not in page


def hardest_pages(text: str) -> str:
    def record(rank: int, value: float) -> HardNegative:
        return HardNegative(
            caption=text,
            key=text,
            similarity=value,
            wrong_key=text,
            wrong_similarity=0.5,
            rank=rank,
        )

    moved = [Movement(before=record(1, 0.6), after=record(4, 0.3))]
    return hardest_page(
        [moved[0].after],
        5,
        title=text,
        strips=lambda key: "data:image/jpeg;base64,AAAA",
        moved=moved,
        steps=(100, 300),
    )


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS)
@example("".join(HOSTILE))
def test_hostile_text_adds_nothing_to_the_hardest_captions(text: str) -> None:
    page = hardest_pages(text)
    assert Structure(page).parts == Structure(hardest_pages("plain")).parts
    assert HIDDEN.search(page) is None
    assert re.search("lead .0.2000; before -0.1000 with rank 1", Page(page).text)


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(explanation_page(explanation(caption=HOSTILE[0]), FRAMES, title=HOSTILE[2]))
    with chromium(tmp_path / "profile") as browser:
        tab = browser.open(path)
        tab.wait_for("document.readyState === 'complete'")
        assert tab.errors() == []
        assert [url for url in tab.requested() if not url.startswith("data:")] == [path.as_uri()]
        assert tab.value("document.querySelectorAll('td.best').length") == 5
        wide = "[...document.images].filter(x => x.naturalWidth > 0 && x.width >= 76).length"
        assert tab.value(wide) == 3
        # The strongest cell has the strongest colour.
        colour = "x => getComputedStyle(x).backgroundColor"
        cells = tab.value(f"[...document.querySelectorAll('tbody .cell')].map({colour})")
        assert len(set(cells)) > 5
