"""The form in which captions are stored."""

from __future__ import annotations

import html
from collections.abc import Iterable


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Returns the captions as they are stored.

    HTML entities are resolved twice, as CLIP does; words are separated by one space; empty captions
    are dropped.
    """
    texts = (" ".join(html.unescape(html.unescape(caption)).split()) for caption in captions)
    return tuple(text for text in texts if text)
