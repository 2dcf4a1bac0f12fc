"""The page of `tvr compare --html`: the tables, without scripts or anything to load."""

from __future__ import annotations

from pathlib import Path

from tvr.data_prep.html_page import page_template
from tvr.trainer.comparison.compare import (
    COLUMNS,
    Comparison,
    shown_difference,
    shown_interval,
    shown_p,
    shown_spread,
)
from tvr.trainer.comparison.statistics import CONFIDENCE


def comparison_page(comparison: Comparison) -> str:
    """One self-contained HTML document; names of runs are shown as text."""
    return page_template(Path(__file__).parent, "comparison.html.jinja").render(
        comparison=comparison,
        columns=COLUMNS,
        confidence=f"{100 * CONFIDENCE:.0f} %",
        shown_interval=shown_interval,
        shown_difference=shown_difference,
        shown_p=shown_p,
        shown_spread=shown_spread,
    )
