"""Building blocks of HTML pages: a shared style, and pictures as data URLs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

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
