"""The scale of a chart in a real browser: the values choose it, and the reader can switch it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from builders.browser import Tab, chromium
from builders.run_logs import step_event, write_run

from tvr.trainer.monitoring.step_record import ALL_PARTS
from tvr.trainer.pages.dashboard import write_dashboard

# A panel is logarithmic if all its values are positive and the largest exceeds 20 medians.
STEPS = 6
SPIKE = {
    "gradient_norm": 21.0,
    "step_s": 20.0,
    "parts_s": dict.fromkeys(ALL_PARTS, 100.0),
    "samples_per_s": 1.0,
}
EXPECTED_SCALES = {
    "tvr_train_gradient_norm": "log",
    "tvr_train_step_seconds": "linear",  # the largest value is 20 medians, not more
    "tvr_data_wait_seconds_total": "linear",  # one value is 0
    "tvr_train_pairs_per_second": "linear",  # one value is far below the median, none above
    "tvr_train_loss": "log",  # each line is constant: the values of all lines count
    "tvr_train_part_seconds_total-0": "linear",  # stacked
}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    folder = tmp_path_factory.mktemp("axes")
    losses = {"loss": 100.0, "similarity_loss": 3.0, "tpm_cl_loss": 1.0, "penalty": 0.1}
    usual = {"gradient_norm": 1.0, "step_s": 1.0, "parts_s": dict.fromkeys(ALL_PARTS, 1.0)}
    waits = [0.0, *[0.1] * (STEPS - 2), 100.0]
    events = [
        step_event(step, **losses, **usual, data_wait_s=wait)
        for step, wait in enumerate(waits, start=1)
    ]
    events[-1] |= SPIKE
    page = folder / "dashboard.html"
    write_dashboard([write_run(folder / "run", *events)], page)
    with chromium(folder / "profile") as browser:
        tab = browser.open(page)
        tab.wait_for("document.body && document.body.dataset.drawn")
        yield tab


def scale(panel: str) -> str:
    """A JavaScript expression for the type of a panel's y axis."""
    return f"document.querySelector('#{panel} .chart')._fullLayout.yaxis.type"


@pytest.mark.parametrize("panel", EXPECTED_SCALES)
def test_the_values_choose_the_scale(tab: Tab, panel: str) -> None:
    assert tab.value(scale(panel)) == EXPECTED_SCALES[panel]


@pytest.mark.parametrize("panel", ["tvr_train_gradient_norm", "tvr_train_step_seconds"])
def test_the_button_switches_the_scale_of_its_panel(tab: Tab, panel: str) -> None:
    button = (
        f"[...document.querySelectorAll('#{panel} header button')]"
        ".find((button) => button.textContent === 'log')"
    )
    scales = [EXPECTED_SCALES[panel], {"log": "linear", "linear": "log"}[EXPECTED_SCALES[panel]]]
    others = [name for name in EXPECTED_SCALES if name != panel]
    for before, after in (scales, scales[::-1]):
        pressed = f"{button}.getAttribute('aria-pressed')"
        assert tab.value(pressed) == str(before == "log").lower()
        tab.value(f"{button}.click()")
        tab.wait_for(f"{scale(panel)} === '{after}'")
        assert tab.value(pressed) == str(after == "log").lower()
        assert [tab.value(scale(name)) for name in others] == [
            EXPECTED_SCALES[name] for name in others
        ]


def test_a_stacked_panel_has_no_button_for_the_scale(tab: Tab) -> None:
    labels = (
        "[...document.querySelectorAll('[id=\"{}\"] header button')].map((one) => one.textContent)"
    )
    assert tab.value(labels.format("tvr_train_part_seconds_total-0")) == ["wide"]
    assert tab.value(labels.format("tvr_train_step_seconds")) == ["log", "wide"]
    assert tab.errors() == []
