"""Where the captions of an annotation's row are: one or several, in one or several fields.

- `caption` or `captions` is a text, a list of texts, or null. A row has one of the two.
- `caption_1`, `caption_2`, ... are further captions, in the order of their numbers.
- A cell of a CSV file that begins with "[" and ends with "]" is a list: in JSON, or as Python
  writes a list of texts.

A null is no caption. If captions lie in several fields, an empty one of them is none either.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

CAPTION_FIELDS = ("caption", "captions")
NUMBERED = re.compile(r"captions?_?([0-9]{1,6})")
# As Python writes a list of texts; two texts without a comma between are not one.
_TEXT = r"(?:'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"|None)"
_LIST = re.compile(rf"\[\s*(?:{_TEXT}\s*(?:,\s*{_TEXT}\s*)*(?:,\s*)?)?\]", re.DOTALL)
_TEXTS = re.compile(_TEXT, re.DOTALL)


def is_caption_field(name: str) -> bool:
    """True for the name of a field of captions."""
    return name in CAPTION_FIELDS or NUMBERED.fullmatch(name) is not None


def captions_of(row: Mapping[str, Any]) -> list[str]:
    """Returns the captions of a row, in the order of its fields; those with numbers last.

    Raises:
        ValueError: a caption is no text, or the row has no field of captions.
    """
    numbered = sorted(
        (int(match[1]), name) for name in row if (match := NUMBERED.fullmatch(name)) is not None
    )
    names = [*(name for name in row if name in CAPTION_FIELDS), *(name for _, name in numbered)]
    if not names or all(name in row for name in CAPTION_FIELDS):
        raise ValueError('give either "captions" (a list) or "caption" (one text)')
    texts: list[str] = []
    for name in names:
        value = row[name]
        for text in value if isinstance(value, list) else [value]:
            if text is None:
                continue
            if not isinstance(text, str):
                raise ValueError(f"{name}={value!r:.200} must be text")
            texts.append(text)
    if len(names) > 1:
        texts = [text for text in texts if text.strip()]
    return texts


def cell_value(cell: str) -> str | list[str | None]:
    """Returns the caption of a CSV cell, or the captions if it holds a list.

    Raises:
        ValueError: the cell looks like a list and is none.
    """
    text = cell.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return cell
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, list) and all(isinstance(value, str | None) for value in values):
        return values
    if _LIST.fullmatch(text):
        with suppress(SyntaxError):  # an escape that Python does not know
            return [ast.literal_eval(part) for part in _TEXTS.findall(text)]
    if _begins_a_list(text):
        raise ValueError(
            f'{cell!r:.200} must be a list of texts, such as ["a man", "a dog"], or a text that'
            " does not begin so"
        )
    return cell


def _begins_a_list(text: str) -> bool:
    """True if a quoted text follows the bracket: "[Music] [laughs]" is a caption."""
    return text[1:].lstrip()[:1] in ("'", '"')
