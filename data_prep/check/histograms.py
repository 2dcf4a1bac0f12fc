"""Draws a distribution as a histogram."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tvr.data_prep.check.distribution import Distribution, readable
from tvr.data_prep.html_page import GRID, INK, SERIES, chart_settings, figure_svg


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
