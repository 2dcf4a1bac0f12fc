"""Building blocks of HTML pages: a shared style, and pictures as data URLs."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

FRAME_HEIGHT = 72
FRAME_GAP = 1
# Characters that would be invisible, reorder the text around them, or cannot be written as UTF-8:
# control characters but tab and newline, bidirectional embeddings, overrides and isolates, halves
# of UTF-16 pairs, non-characters.
HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def page_template(folder: Path, name: str) -> Template:
    """Loads a Jinja template from `folder`; it may include page.css.jinja.

    Text from data is shown as text: markup in it is escaped, and hidden characters are visible, see
    `shown_text`. That holds for data that scripts read (`tojson`), too.
    """
    # An undefined name is an error instead of an empty string.
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalized,
    )
    environment.policies["json.dumps_function"] = _script_json
    return environment.get_template(name)


def shown_text(text: str) -> str:
    """Replaces each hidden character by its number, such as \\u202e."""
    return HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finalized(value: object) -> object:
    # Markup, which is a kind of str, comes from templates and from our own drawings.
    return shown_text(value) if type(value) is str else value


def _script_json(value: object, **settings: Any) -> str:
    return json.dumps(_script_value(value), allow_nan=False, **settings)


def _script_value(value: object) -> object:
    """The same value with visible text; null for numbers that JSON lacks (NaN, infinity)."""
    if isinstance(value, str):
        return shown_text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {shown_text(str(name)): _script_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_script_value(item) for item in value]
    return value


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
