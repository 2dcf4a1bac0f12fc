"""Building blocks of HTML pages: a shared style, charts as inline SVG, pictures as data URLs."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from io import BytesIO, StringIO
from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

# matplotlib does not support CSS variables. It draws with these placeholder colours, which
# `figure_svg` replaces with the page's colours, so that charts are legible in light and dark mode.
INK, GRID = "#010203", "#010204"
SERIES = ("#010211", "#010212", "#010213")
CSS_COLOURS = {
    INK: "var(--muted)",
    GRID: "var(--line)",
    **{colour: f"var(--series-{index + 1})" for index, colour in enumerate(SERIES)},
}
FRAME_HEIGHT = 72
FRAME_GAP = 1


def page_template(folder: Path, name: str) -> Template:
    """Loads a Jinja template from `folder`; it may include page.css.jinja."""
    # All data is escaped; an undefined name is an error instead of an empty string.
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


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


def picture_strip(frames: Sequence[Image.Image], max_height: int = FRAME_HEIGHT) -> str:
    """Joins pictures side by side, at most `max_height` pixels high; returns a JPEG data URL."""
    height = min(max_height, *(frame.height for frame in frames))
    sized = [
        frame.convert("RGB").resize((max(1, frame.width * height // frame.height), height))
        for frame in frames
    ]
    width = sum(frame.width for frame in sized) + FRAME_GAP * (len(sized) - 1)
    strip = Image.new("RGB", (width, height), "gray")
    left = 0
    for frame in sized:
        strip.paste(frame, (left, 0))
        left += frame.width + FRAME_GAP
    data = BytesIO()
    strip.save(data, format="JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
