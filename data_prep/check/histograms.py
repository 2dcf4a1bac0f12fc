"""Draws a distribution as a histogram: inline SVG in the style of an HTML page."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from io import StringIO

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tvr.data_prep.check.distribution import Distribution, readable

# matplotlib does not support CSS variables. It draws with these placeholder colours, which
# `figure_svg` replaces with the page's colours, so that charts are legible in light and dark mode.
INK, GRID = "#010203", "#010204"
SERIES = ("#010211", "#010212", "#010213")
CSS_COLOURS = {
    INK: "var(--muted)",
    GRID: "var(--line)",
    **{colour: f"var(--series-{index + 1})" for index, colour in enumerate(SERIES)},
}


def histogram_svg(values: Distribution, *, name: str, x_label: str, y_label: str) -> str:
    """Draws a histogram with a line at the median; returns an `<svg>` element."""
    with chart_settings(name):
        return figure_svg(_figure(values, x_label, y_label), name)


def _figure(values: Distribution, x_label: str, y_label: str) -> Figure:
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(values.counts, values.edges, fill=True, color=SERIES[0], alpha=0.75)
    axes.axvline(values.median, color=SERIES[1], lw=1.5, ls="--")
    axes.annotate(
        f"median {readable(values.median)}",
        (values.median, 1.02),
        xycoords=("data", "axes fraction"),
        color=SERIES[1],
        ha="center",
        fontsize=9,
    )
    if values.num_beyond:
        label = f"{x_label} ({values.num_beyond:,} beyond, up to {readable(values.most)})"
    else:
        label = x_label
    axes.set_xlabel(label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    has_wide_range = values.edges[-1] - values.edges[0] > 4
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=has_wide_range))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: readable(value)))
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    return figure


def chart_settings(name: str) -> AbstractContextManager[None]:
    """Context with the matplotlib settings for drawing a figure that `figure_svg` converts."""
    # Text stays text, in the page's font, and equal numbers give equal bytes.
    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10})


def figure_svg(figure: Figure, name: str) -> str:
    """Converts a figure to an `<svg>` element in the page's style.

    Args:
        figure: Drawn within `chart_settings(name)`.
        name: Accessible label; must be unique on the page, because the element ids depend on it.
    """
    text = StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for placeholder, css in CSS_COLOURS.items():
        svg = svg.replace(placeholder, css)
    # The backgrounds of figure and axes are opaque white.
    svg = re.sub(r"fill: #ffffff(; stroke: #[0-9a-f]{6})?", "fill: none", svg)
    # Group ids repeat in every chart, ids must be unique on a page, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The page sets the font and, from the view box, the size.
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    return re.sub(
        r'<svg[^>]*(viewBox="[^"]*")[^>]*>',
        rf'<svg \1 role="img" aria-label="{name}">',
        svg,
        count=1,
    )
