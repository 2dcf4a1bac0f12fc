"""Opens text files in the encodings that spreadsheets and other programs write."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO, cast

from tvr.data_prep.storage.storage import open_file

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
    with open_file(url, compression="infer") as file:
        start = file.read(4)
    return next((name for mark, name in MARKS if start.startswith(mark)), "utf-8-sig")


@contextmanager
def open_text(url: str) -> Iterator[TextIO]:
    """Opens a text file, compressed or not; its ends of lines are kept.

    Bytes that are not UTF-8 become surrogates: they spoil a row and not the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is compressed and damaged, or is damaged UTF-16 or UTF-32.
    """
    try:
        encoding = text_encoding(url)
        errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
        options = {"encoding": encoding, "errors": errors, "newline": ""}
        with open_file(url, "rt", compression="infer", **options) as file:
            yield cast(TextIO, file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"annotation file {url} does not exist") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{url}: the compressed file is damaged or cut off: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{url}: not {encoding} text: {error}") from error
