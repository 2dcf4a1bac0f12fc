"""Rules for the keys of clips, and keys made from file names.

A key made from a file name is readable and belongs to that name:

- A name of ASCII characters that fits keeps its letters, digits, "_" and "-"; each other character
  becomes "_".
- Any other name gives what is readable of it, "-", and 12 characters of a hash of the name.
- If rows of different videos would have the same key, all but the first get "-" and the hash of
  the row's video and cut, see `same_key`.
"""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b

from tvr.data_prep.records import KEY_PATTERN, MAX_KEY_LENGTH, Clip

__all__ = [
    "KEY_PATTERN",
    "file_stem",
    "hashed_key",
    "key_of",
    "key_rule",
    "name_hash",
    "source_of",
    "span_suffix",
]

_OTHER = re.compile(r"[^A-Za-z0-9_-]")
_DIGITS = "abcdefghijklmnopqrstuvwxyz234567"
_HASH_LENGTH = 12
_HASHED = re.compile(rf"-[a-z2-7]{{{_HASH_LENGTH}}}(?:_\d+_(?:\d+|end))?\Z")


def key_rule(key: str) -> str:
    """Returns the error message for an invalid key."""
    return f'key={key!r:.200} must be 1 to {MAX_KEY_LENGTH} letters, digits, "_" or "-"'


def file_stem(video: str) -> str:
    """Returns the name of a video's file without folders and extension."""
    stem = video.rstrip("/").rsplit("/", 1)[-1]
    return stem.rsplit(".", 1)[0] if "." in stem[1:] else stem


def key_of(video: str, suffix: str = "") -> str:
    """Makes a key from a video's file name, and the `span_suffix` of its cut."""
    stem = file_stem(video)
    key = _OTHER.sub("_", stem) + suffix
    if stem.isascii() and KEY_PATTERN.fullmatch(key):
        return key
    # Letters without their accents; what is left of most scripts is nothing.
    plain = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", stem))
    readable = re.sub("[^A-Za-z0-9_-]+", "_", plain).strip("_-") or "video"
    return hashed_key(readable, name_hash(stem), suffix)


def span_suffix(start_s: float, end_s: float | None) -> str:
    """Returns the key suffix of a cut, "_START_END" in milliseconds; "" for a whole video."""
    if start_s == 0 and end_s is None:
        return ""
    return f"_{round(1000 * start_s)}_{'end' if end_s is None else round(1000 * end_s)}"


def name_hash(text: str) -> int:
    """Hashes a text to 60 bits, never 0, the same in every process and release."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 4 or 1


def hashed_key(readable: str, number: int, suffix: str = "") -> str:
    """Returns a key of a readable part, which may be cut off, a `name_hash` and a suffix."""
    digits = (_DIGITS[number >> 5 * place & 31] for place in reversed(range(_HASH_LENGTH)))
    ending = f"-{''.join(digits)}{suffix}"
    return readable[: MAX_KEY_LENGTH - len(ending)] + ending


def source_of(clip: Clip) -> str | None:
    """Returns the clip's video if its key was made from the file's name and does not tell it.

    That is a key with a hash, or with characters replaced whose video_id does not have them either.
    """
    if _HASHED.search(clip.key) is None:
        stem = file_stem(clip.video)
        is_made = clip.key == key_of(clip.video, span_suffix(clip.start_s, clip.end_s))
        if not is_made or stem in clip.key or stem in clip.video_id:
            return None
    # A path may hold bytes that are no UTF-8.
    return clip.video.encode("utf-8", "backslashreplace").decode()
