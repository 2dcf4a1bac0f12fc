"""Keys of clips: what they may be, and those made from file names."""

from __future__ import annotations

import re

# A tar member is KEY.extension within USTAR's 100 bytes, and WebDataset splits it at the first dot.
MAX_KEY_LENGTH = 80
KEY_PATTERN = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}")


def key_rule(key: str) -> str:
    """The sentence that refuses a key."""
    return f'key={key!r} must be 1 to {MAX_KEY_LENGTH} letters, digits, "_" or "-"'


def key_of(video: str) -> str:
    """The key of a video's file name: without its extension, every other character as "_"."""
    stem = video.rstrip("/").rsplit("/", 1)[-1]
    stem = stem.rsplit(".", 1)[0] if "." in stem[1:] else stem
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem)


def span_suffix(start_s: float, end_s: float | None) -> str:
    """What tells the cuts of one file apart in their keys."""
    if start_s == 0 and end_s is None:
        return ""
    return f"_{round(1000 * start_s)}_{'end' if end_s is None else round(1000 * end_s)}"
