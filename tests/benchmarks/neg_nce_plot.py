"""Plots the results of neg_nce_synthetic.py and neg_nce_demo.py: results/neg_nce.png.

The background is transparent and the colours are middle tones, so that the plot is readable on
white and on dark pages. Prints one line of JSON that lists the plots.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

RESULTS = Path(__file__).parent / "results"
# All have a contrast of at least 3 with white and with GitHub's dark page (#0d1117).
INK, FAINT = "#7d828a", "#7d828a55"
COLOURS = {
    "info_nce": "#2f9e5b",
    "neg_nce reference": "#d9730d",
    "neg_nce log": "#388bfd",
}
NAMES = {
    "info_nce": "InfoNCE",
    "neg_nce reference": "NegNCE, reference",
    "neg_nce log": "NegNCE, log",
}
MODES = ("neg_nce reference", "neg_nce log")
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--synthetic", type=Path, default=RESULTS / "neg_nce_synthetic.json")
    parser.add_argument("--demo", type=Path, default=RESULTS / "neg_nce_demo.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "neg_nce.png")
    options = parser.parse_args()
    synthetic, demo = (json.loads(x.read_text()) for x in (options.synthetic, options.demo))
    size = draw(synthetic, demo, options.out)
    alignments = sorted({row["alignment"] for row in synthetic["rows"]})
    batches = sorted({row["global_batch"] for row in demo["rows"]})
    line = {
        "plot": options.out.name,
        "bytes": size,
        "alignments": alignments,
        "global_batches": batches,
    }
    print(json.dumps(line))


def draw(synthetic: dict[str, Any], demo: dict[str, Any], out: Path) -> int:
    """Writes the picture and returns its size in bytes."""
    with matplotlib.rc_context({"font.size": 10.5, "axes.titlesize": 11, "text.color": INK}):
        figure = Figure(figsize=(11, 6.6), layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 3)
        hard_panel(upper[0], synthetic["rows"])
        mode_panel(upper[1], synthetic["rows"], "penalty_to_positive", log=True)
        upper[1].set_yscale("log")
        upper[1].set_title("Negative term / rest of the loss")
        mode_panel(upper[2], synthetic["rows"], "positives_silent")
        upper[2].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        upper[2].set_title("Losing positives with gradient 0")
        demo_panel(lower[0], demo["rows"], "text_to_video_r_at_1", "Demo: R@1 text to video")
        demo_panel(lower[1], demo["rows"], "video_to_text_r_at_1", "Demo: R@1 video to text")
        demo_panel(lower[2], demo["rows"], "binding_accuracy", "Demo: binding (chance 50 %)")
        lower[2].axhline(50, color=INK, lw=1, ls=":")
        for axes in (*upper, *lower):
            style(axes)
        figure.legend(handles=legend(synthetic["rows"]), ncols=7, **LEGEND)
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
        figure.savefig(out, dpi=150, transparent=True, metadata={"Software": None})
    return out.stat().st_size


LEGEND: dict[str, Any] = {
    "loc": "outside lower center",
    "frameon": False,
    "labelcolor": INK,
    "handlelength": 2.2,
    "columnspacing": 1.2,
    "fontsize": 9.5,
}


def legend(rows: list[dict[str, Any]]) -> list[Any]:
    """Colours are losses, line styles alignments."""
    losses = [Patch(color=COLOURS[loss], label=name) for loss, name in NAMES.items()]
    alignments = sorted({row["alignment"] for row in rows})
    return losses + [
        Line2D([], [], color=INK, ls=style, marker=marker, ms=4, label=f"cosine {alignment}")
        for alignment, style, marker in zip(alignments, STYLES, MARKERS, strict=False)
    ]


def hard_panel(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Hard negatives depend on the features alone, so one loss serves."""
    plot_by_alignment(axes, rows, "neg_nce log", "hard_share", INK, log=True)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    axes.set_title("Hard negatives, of all pairs")


def percent(share: float, _: int) -> str:
    return f"{100 * share:.9f}".rstrip("0").rstrip(".") + "%"


def mode_panel(axes: Axes, rows: list[dict[str, Any]], measure: str, *, log: bool = False) -> None:
    for loss in MODES:
        plot_by_alignment(axes, rows, loss, measure, COLOURS[loss], log=log)


def plot_by_alignment(
    axes: Axes, rows: list[dict[str, Any]], loss: str, measure: str, colour: str, *, log: bool
) -> None:
    alignments = sorted({row["alignment"] for row in rows})
    for alignment, line, marker in zip(alignments, STYLES, MARKERS, strict=False):
        mine = [row for row in rows if row["loss"] == loss and row["alignment"] == alignment]
        pairs = [row["pairs"] for row in mine]
        # A logarithmic axis has no place for 0.
        values = [[x or math.nan for x in row[measure]] if log else row[measure] for row in mine]
        mean, low, high = zip(*values, strict=True)
        axes.plot(pairs, mean, ls=line, marker=marker, ms=4, lw=1.7, color=colour)
        axes.fill_between(pairs, low, high, color=colour, alpha=0.18, lw=0)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["pairs"] for row in rows})[::2]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("global batch")


def demo_panel(axes: Axes, rows: list[dict[str, Any]], measure: str, title: str) -> None:
    """A group of bars for each batch size: the mean over seeds, and a line from least to most."""
    batches = sorted({row["global_batch"] for row in rows})
    for place, loss in enumerate(COLOURS):
        for group, batch in enumerate(batches):
            (row,) = [x for x in rows if x["loss"] == loss and x["global_batch"] == batch]
            mean, low, high = row[measure]
            x = group + 0.27 * (place - 1)
            axes.bar(x, mean, width=0.24, color=COLOURS[loss])
            axes.plot([x, x], [low, high], color=INK, lw=2, solid_capstyle="butt")
            axes.annotate(
                f"{mean:.1f}",
                (x, high),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 25))
    axes.yaxis.set_major_formatter(PercentFormatter(100))
    axes.set_title(title)


def style(axes: Axes) -> None:
    axes.title.set_color(INK)
    axes.xaxis.label.set_color(INK)
    axes.tick_params(colors=INK, length=0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)


if __name__ == "__main__":
    main()
