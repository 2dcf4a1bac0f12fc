"""Opens text files in the encodings that spreadsheets and other programs write."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO, cast

import fsspec

# Byte-order marks, longer ones first. Without one, a text is UTF-8.
MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


def text_encoding(url: str) -> str:
    """Returns the encoding that the first bytes of a file tell."""
    with fsspec.open(url, "rb", compression="infer") as file:
        start = file.read(4)  # type: ignore[union-attr]
    return next((name for mark, name in MARKS if start.startswith(mark)), "utf-8-sig")


@contextmanager
def open_text(url: str) -> Iterator[TextIO]:
    """Opens a text file, compressed or not; its ends of lines are kept.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the text has bytes that its encoding does not allow, or its gzip file is
            damaged.
    """
    try:
        options = {"encoding": text_encoding(url), "newline": ""}
        with fsspec.open(url, "rt", compression="infer", **options) as file:
            yield cast(TextIO, file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"annotation file {url} does not exist") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{url}: not UTF-8 text: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{url}: a damaged or truncated gzip file: {error}") from error
