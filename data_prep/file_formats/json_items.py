"""Reads the rows of a JSON file one after another, in the memory of one row.

A `.json` file of annotations is one of these:

- a list of objects, [{"video": ..., "caption": ...}, ...];
- an object that has such a list in a field of LIST_FIELDS, whose other fields have no effect;
- an object with the videos' names as fields, {"a.mp4": "a caption", "b.mp4": ["several", ...]},
  or with an object of the other fields for each video;
- one object a line, as in a .jsonl file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

from tvr.data_prep.file_formats.text_encoding import open_text

LIST_FIELDS = ("annotations", "data", "clips", "videos", "samples")
# Characters read at a time, and the most that one row may have.
PIECE = 1 << 20
MAX_ROW = 1 << 24
# Fields that may precede the list of rows. An object with more has the videos as fields.
MAX_OTHER_FIELDS = 64


class RepeatedFields(dict[str, Any]):
    """An object of which a field occurs twice."""


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    return fields if len(fields) == len(pairs) else RepeatedFields(fields)


_DECODER = json.JSONDecoder(object_pairs_hook=_fields)


class JsonItem(NamedTuple):
    """One row of a file."""

    origin: str
    """Its location, "file:line"."""
    value: Any
    name: str | None = None
    """Name of the video, if the row is a field of an object."""


def json_items(url: str) -> Iterator[JsonItem]:
    """Yields the rows of a JSON file in order.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not JSON, or none of the above; the message has the line.
    """
    with open_text(url) as file:
        text = _JsonText(file, url)
        start = text.peek()
        if start == "[":
            yield from _list(text)
        elif start == "{" and text.has_lines():
            while text.peek():
                yield JsonItem(text.where(), text.value())
        elif start == "{":
            yield from _object(text)
        elif start:
            raise text.error("expected a list or an object")
        if text.peek():
            raise text.error("more text after the end of the JSON")


def _list(text: _JsonText) -> Iterator[JsonItem]:
    text.take("[")
    while text.peek() != "]":
        yield JsonItem(text.where(), text.value())
        if text.peek() != "]":
            text.take(",")
    text.take("]")


def _object(text: _JsonText) -> Iterator[JsonItem]:
    waiting: list[JsonItem] = []
    have_rows = are_videos = False
    text.take("{")
    while text.peek() != "}":
        where, name = text.where(), text.value()
        if not isinstance(name, str):
            raise text.error(f"the name of a field must be a text, found {name!r:.100}")
        text.take(":")
        if name in LIST_FIELDS and not are_videos and not have_rows and text.peek() == "[":
            rows = _list(text)
            first = next(rows, None)
            if first is not None and isinstance(first.value, dict):
                have_rows = True
                waiting.clear()
                yield first
                yield from rows
            else:  # the captions of a video of that name
                values = [] if first is None else [first.value, *(row.value for row in rows)]
                waiting.append(JsonItem(where, values, name))
        else:
            value = text.value()
            if have_rows and name in LIST_FIELDS and isinstance(value, list) and value:
                raise text.error(f"a second list of rows, {name!r}; keep one of the lists")
            waiting.append(JsonItem(where, value, name))
        if have_rows:
            waiting.clear()
        elif are_videos or len(waiting) > MAX_OTHER_FIELDS:
            are_videos = True
            yield from waiting
            waiting.clear()
        if text.peek() != "}":
            text.take(",")
    text.take("}")
    fields = {item.name: item.value for item in waiting}
    if not are_videos and ("video" in fields or "clip_name" in fields):
        yield JsonItem(waiting[0].origin, fields)  # one row, which is no list
    else:
        yield from waiting


class _JsonText:
    """The text of a file, of which a part is in memory."""

    def __init__(self, file: TextIO, url: str) -> None:
        self._file = file
        self._url = url
        self._text = ""
        self._at = 0
        self._line = 1
        self._counted = 0
        self._ended = False

    def where(self) -> str:
        """Returns the location of what comes next, "file:line"."""
        self.peek()
        self._line += _num_lines(self._text[self._counted : self._at])
        self._counted = self._at
        return f"{self._url}:{self._line}"

    def error(self, problem: str) -> ValueError:
        """Returns an error at this place."""
        return ValueError(f"{self.where()}: not JSON of annotations: {problem}")

    def peek(self) -> str:
        """Returns the next character that is no white space; "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at]
                self._at += 1
            if not self._read_more():
                return ""

    def take(self, character: str) -> None:
        """Passes over a character, which must come next."""
        if (found := self.peek()) != character:
            expected = f"expected {character!r}, found {found!r}" if found else "the file ends"
            raise self.error(expected)
        self._at += 1

    def value(self) -> Any:
        """Reads a value. Only the names of fields and the rows are values here."""
        self._forget()
        self.peek()
        value, self._at = self._decode()
        return value

    def has_lines(self) -> bool:
        """True if another object follows the first one."""
        self._forget()
        try:
            _, end = self._decode()
        except ValueError:
            return False  # an error is found again, or the object is large
        start, self._at = self._at, end
        is_object = self.peek() == "{"
        self._at = start
        return is_object

    def _decode(self) -> tuple[Any, int]:
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self.error("nested too deeply") from error
            except ValueError as error:
                # The value may end in text that is not read yet.
                if len(self._text) - self._at < MAX_ROW and self._read_more():
                    continue
                if not self._ended:
                    problem = f"no value of at most {MAX_ROW:,} characters begins here"
                    raise self.error(problem) from error
                place = max(self._counted, getattr(error, "pos", self._at))
                line = self._line + _num_lines(self._text[self._counted : place])
                message = getattr(error, "msg", str(error))
                raise ValueError(f"{self._url}:{line}: not JSON: {message}") from error
            # A number may go on.
            if end < len(self._text) or isinstance(value, dict | list | str):
                return value, end
            if not self._read_more():
                return value, end

    def _forget(self) -> None:
        """Drops text that was read, seldom: the rest is copied."""
        if self._at < PIECE:
            return
        self._line += _num_lines(self._text[self._counted : self._at])
        self._text, self._at, self._counted = self._text[self._at :], 0, 0

    def _read_more(self) -> bool:
        # As much again: a value is decoded from its beginning after each of these.
        more = self._file.read(max(PIECE, len(self._text) - self._at))
        self._text += more
        self._ended = not more
        return bool(more)


def _num_lines(text: str) -> int:
    """Returns the number of line ends: LF, CR LF, or a lone CR."""
    return text.count("\n") + text.count("\r") - text.count("\r\n")
