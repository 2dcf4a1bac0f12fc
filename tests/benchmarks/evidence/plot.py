"""Plots the results of both sets: results/evidence.png, every row with its 95 % intervals.

The background is transparent and the colours are middle tones, so that the plot is readable on
white and on dark pages. Prints one line of JSON that lists the plots.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
# All have a contrast of at least 3 with white and with GitHub's dark page (#0d1117).
INK, FAINT = "#7d828a", "#7d828a55"
WON, LOST, OPEN = "#2f9e5b", "#d9730d", "#388bfd"
TITLES = {"shapes": "Shapes, 2,000 clips", "droid1k": "droid1k, 5 folds"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=Path, default=RESULTS / "shapes.json")
    parser.add_argument("--droid1k", type=Path, default=RESULTS / "droid1k.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "evidence.png")
    options = parser.parse_args()
    paths = {"shapes": options.shapes, "droid1k": options.droid1k}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    if not found:
        raise SystemExit(f"neither {options.shapes} nor {options.droid1k} exists: run run.py first")
    print(json.dumps({"plot": options.out.name, "bytes": draw(found, options.out)}))


def draw(found: dict[str, dict[str, Any]], out: Path) -> int:
    """Writes the picture and returns its size in bytes."""
    rows = max(len(each["rows"]) for each in found.values())
    with matplotlib.rc_context({"font.size": 10, "axes.titlesize": 11, "text.color": INK}):
        figure = Figure(figsize=(12, (0.34 * rows + 1.4) * len(found)), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(found), 3, squeeze=False)
        for line, (name, each) in zip(grid, found.items(), strict=True):
            title = TITLES.get(name, name)
            means_panel(line[0], each["rows"], f"{title}: R@1, mean of both ways")
            difference_panel(line[1], each, "recall_at_1", f"R@1 against {each['first']}")
            difference_panel(line[2], each, "mean_reciprocal_rank", f"MRR against {each['first']}")
            line[0].set_yticks(range(len(each["rows"])), [row["row"] for row in each["rows"]])
        for axes in grid.flat:
            style(axes)
        figure.savefig(out, dpi=130, transparent=True, metadata={"Software": None})
    return out.stat().st_size


def means_panel(axes: Axes, rows: list[dict[str, Any]], title: str) -> None:
    """A bar for each row, the interval over seeds and queries, and a dot for each seed."""
    for place, row in enumerate(rows):
        mean = row["means"]["recall_at_1"]
        axes.barh(place, mean["value"], color=OPEN, alpha=0.55, height=0.6)
        axes.plot(mean["interval"], [place, place], color=INK, lw=2, solid_capstyle="butt")
        seeds = row["by_seed"]["recall_at_1"]
        axes.plot(seeds, [place] * len(seeds), ls="", marker="o", ms=3.5, color=INK)
    axes.set_title(title)
    axes.set_xlabel("percent")
    axes.invert_yaxis()


def difference_panel(axes: Axes, found: dict[str, Any], metric: str, title: str) -> None:
    """The paired difference of each row; green or orange where its interval excludes 0."""
    for place, row in enumerate(found["rows"]):
        if row["against_first"] is None:
            continue
        mean = row["against_first"][metric]
        low, high = mean["interval"]
        colour = WON if low > 0 else LOST if high < 0 else OPEN
        axes.plot([low, high], [place, place], color=colour, lw=2.4, solid_capstyle="butt")
        axes.plot(mean["of_queries"], [place, place], color=colour, lw=5, alpha=0.35)
        axes.plot(mean["value"], place, marker="o", ms=6, color=colour)
    axes.axvline(0, color=INK, lw=1)
    axes.set_ylim(len(found["rows"]) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlabel("points")
    axes.set_title(title)


def style(axes: Axes) -> None:
    axes.title.set_color(INK)
    axes.xaxis.label.set_color(INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="x", color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)


if __name__ == "__main__":
    main()
