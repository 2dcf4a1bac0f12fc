"""Rules for the keys of clips, and keys made from file names."""

from __future__ import annotations

import re

from tvr.data_prep.records import KEY_PATTERN, MAX_KEY_LENGTH

__all__ = ["KEY_PATTERN", "key_of", "key_rule", "span_suffix"]


def key_rule(key: str) -> str:
    """Returns the error message for an invalid key."""
    return f'key={key!r} must be 1 to {MAX_KEY_LENGTH} letters, digits, "_" or "-"'


def key_of(video: str) -> str:
    """Makes a key from a video's file name: no extension, other characters replaced by "_"."""
    stem = video.rstrip("/").rsplit("/", 1)[-1]
    stem = stem.rsplit(".", 1)[0] if "." in stem[1:] else stem
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem)


def span_suffix(start_s: float, end_s: float | None) -> str:
    """Returns the key suffix of a cut, "_START_END" in milliseconds; "" for a whole video."""
    if start_s == 0 and end_s is None:
        return ""
    return f"_{round(1000 * start_s)}_{'end' if end_s is None else round(1000 * end_s)}"
