"""Line charts as inline SVG with the page's colours, so that they read on light and on dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tvr.data_prep.html_page import GRID, INK, SERIES, chart_settings, figure_svg

MOST_POINTS = 800


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: `y` over `x`, in colour 0, 1 or 2; `smooth` adds a mean over pale values."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    dashed: bool = False
    markers: bool = False
    smooth: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    name: str,
    y_label: str,
    last_step: float,
    y_from_0: bool = False,
    log_if_wide: bool = False,
    minutes: tuple[Sequence[float], Sequence[float]] | None = None,
) -> str:
    """An `<svg>` of lines over the steps 0 to `last_step`.

    `name` says what is seen, and keeps the ids apart from those of other charts on the page.
    `log_if_wide` takes a logarithmic axis where a few large values would flatten all others.
    `minutes` = (steps, minutes), both rising, adds the wall clock as a second axis on top.
    """
    with chart_settings(name):
        figure = Figure(figsize=(6.4, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for line in series:
            _draw(axes, line)
        _style(axes, y_label)
        axes.set_xlim(0, last_step)
        if log_if_wide and _is_wide(series):
            axes.set_yscale("log")
            axes.set_ylabel(f"{y_label} (log scale)")
            axes.tick_params(which="minor", length=0, labelleft=False)
        if y_from_0:
            axes.set_ylim(bottom=0)
        if minutes is not None and len(minutes[0]) > 1:
            _add_clock(axes, *minutes)
        if len(series) > 1:
            figure.legend(
                loc="outside lower center", ncols=3, frameon=False, labelcolor=INK, fontsize=9
            )
        return figure_svg(figure, name)


def running_mean(values: Sequence[float], window: int) -> NDArray[np.float64]:
    """Mean of the finite values in a window centred on each one; shorter at both ends."""
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    # A window wider than the data would make `same` return the window's length.
    ones = np.ones(min(window, len(array)))
    counts = np.convolve(finite.astype(np.float64), ones, mode="same")
    sums = np.convolve(np.where(finite, array, 0.0), ones, mode="same")
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _is_wide(series: Sequence[Series]) -> bool:
    values = np.concatenate([np.asarray(line.y, dtype=np.float64) for line in series])
    values = values[np.isfinite(values)]
    return len(values) > 0 and values.min() > 0 and values.max() > 20 * np.median(values)


def _draw(axes: Axes, line: Series) -> None:
    x, y = np.asarray(line.x, dtype=np.float64), np.asarray(line.y, dtype=np.float64)
    stride = max(1, len(x) // MOST_POINTS)
    colour, style = SERIES[line.colour], "--" if line.dashed else "-"
    if not line.smooth:
        marker = "o" if line.markers else ""
        axes.plot(
            x[::stride],
            y[::stride],
            style,
            color=colour,
            label=line.label,
            lw=1.8,
            marker=marker,
            ms=3.5,
        )
        return
    mean = running_mean(line.y, window=max(1, len(x) // 40))
    axes.plot(x[::stride], y[::stride], color=colour, alpha=0.25, lw=0.8)
    axes.plot(x[::stride], mean[::stride], color=colour, label=line.label, lw=1.8)


def _style(axes: Axes, y_label: str) -> None:
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def _add_clock(axes: Axes, steps: Sequence[float], minutes: Sequence[float]) -> None:
    to_minutes = (lambda x: np.interp(x, steps, minutes), lambda x: np.interp(x, minutes, steps))
    clock = axes.secondary_xaxis("top", functions=to_minutes)
    clock.set_xlabel("minutes", color=INK)
    clock.tick_params(colors=INK, length=0)
    clock.spines["top"].set_visible(False)
