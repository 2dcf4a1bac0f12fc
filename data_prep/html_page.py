"""What the HTML pages are made of: one style, charts as inline SVG, pictures as data URLs."""

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

# matplotlib knows no CSS: it draws with these stand-ins, which are then replaced in its SVG by the
# page's colours, so that charts read on light and on dark.
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
    """A template that may include page.css.jinja."""
    # Everything that comes from data is escaped; undefined names are errors, not empty text.
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def chart_settings(name: str) -> AbstractContextManager[None]:
    """The settings under which a figure becomes `figure_svg(figure, name)`."""
    # Text stays text (it takes the page's font), and the same numbers give the same file.
    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10})


def figure_svg(figure: Figure, name: str) -> str:
    """An `<svg>` that fits the page; `name` says what is seen, and keeps its ids apart from those
    of other charts on the page."""
    text = StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, css in CSS_COLOURS.items():
        svg = svg.replace(stand_in, css)
    # The patches behind figure and axes are opaque white.
    svg = re.sub(r"fill: #ffffff(; stroke: #[0-9a-f]{6})?", "fill: none", svg)
    # Names of groups are the same in every chart, and a page may have each once; nothing uses them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The page decides the font and, given only the view box, the size.
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    return re.sub(
        r'<svg[^>]*(viewBox="[^"]*")[^>]*>',
        rf'<svg \1 role="img" aria-label="{name}">',
        svg,
        count=1,
    )


def picture_strip(frames: Sequence[Image.Image], max_height: int = FRAME_HEIGHT) -> str:
    """One picture or more side by side, at most `max_height` pixels high, as a data URL."""
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
