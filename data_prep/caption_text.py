"""The form in which captions are stored."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

# Byte-order mark, soft hyphen, word joiner, direction of text, invisible operators.
_STEERING = re.compile("[\u00ad\u061c\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
# Control characters, zero-width space, separators of lines, and codes that are no characters.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b\u2028\u2029\ufdd0-\ufdef\ufff9-\ufffb\ufffe\uffff]"
)
# Fillers and blanks that count as letters or symbols, and the marks of what is missing.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800\ufffc\ufffd")


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Returns the captions as they are stored.

    HTML entities are resolved twice, as CLIP does. Text is normalised to NFC. Control characters
    and zero-width spaces become spaces; marks that only steer the display (the byte-order mark, the
    direction of text, soft hyphens) are removed. Words are separated by one space. Captions without
    a visible character are dropped.
    """
    texts = (_clean(html.unescape(html.unescape(caption))) for caption in captions)
    return tuple(text for text in texts if text)


def _clean(text: str) -> str:
    """Returns a caption as it is stored; "" if nothing of it is visible."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", _STEERING.sub("", text))
    if not text.isprintable():
        text = _CONTROL.sub(" ", text)
    text = " ".join(text.split())
    return text if text.isascii() or any(map(_is_visible, text)) else ""


@lru_cache(maxsize=1 << 12)
def _is_visible(character: str) -> bool:
    # Marks need a letter; "Co" is for private use. "Cn" may be a letter of a later Unicode version.
    category = unicodedata.category(character)
    return (
        category[0] not in "MZ"
        and category not in ("Cc", "Cf", "Co", "Cs")
        and (character not in _BLANK)
    )
