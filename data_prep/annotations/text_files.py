"""Reads the lines of text files and the records of CSV files, so that a bad line spoils no other.

Bytes that are not UTF-8 become surrogates, which `line_problem` finds: the lines around them can
be used. A quote of a CSV file that is not closed would make one field of the rest of the file. A
record may therefore have at most MAX_RECORD_LINES lines; the first line of one that is no CSV is
refused, and its other lines are read as records of their own.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from tvr.data_prep.file_formats.text_encoding import open_text

MAX_LINE = 1 << 22
"""Characters of a line; what follows them is not read."""
MAX_RECORD_LINES = 100

_NOT_UTF8 = re.compile(r"[\ud800-\udfff]")


def text_lines(url: str) -> Iterator[str]:
    """Yields text lines, without the byte-order mark that spreadsheets write.

    A line of more than MAX_LINE characters is cut off; bytes that are not UTF-8 are surrogates.

    Raises as `open_text`.
    """
    with open_text(url) as file:
        line = file.readline(MAX_LINE + 1)
        while line:
            yield line
            if len(line) > MAX_LINE and not _is_ended(line):
                while not _is_ended(file.readline(MAX_LINE)):
                    pass
            line = file.readline(MAX_LINE + 1)


def _is_ended(line: str) -> bool:
    return not line or line.endswith(("\n", "\r"))


def line_problem(line: str) -> str:
    """Returns why a line of `text_lines` cannot be used; "" for one that can."""
    if len(line) > MAX_LINE:
        return f"the line has more than {MAX_LINE:,} characters"
    if not line.isascii() and (found := _NOT_UTF8.search(line)):
        byte = ord(found[0]) - 0xDC00
        if not 0x80 <= byte <= 0xFF:
            return f"half of a UTF-16 pair after {found.start()} characters"
        return f"not UTF-8 text: byte {byte:#04x} after {found.start()} characters"
    return ""


class CsvRecord(NamedTuple):
    """A record of a CSV file."""

    number: int
    """Number of its last line."""
    fields: list[str]
    problem: str
    """Why it cannot be used; "" for one that can."""


def csv_records(url: str, *, delimiter: str = ",") -> Iterator[CsvRecord]:
    """Yields the records of a CSV file, its header too; no blank ones. Raises as `text_lines`."""
    csv.field_size_limit(MAX_LINE)  # of the process; 131,072 characters without it
    lines = _Lines(url)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.taken.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            how = ", in a quoted field that begins here" if len(lines.taken) > 1 else ""
            lines.give_back()
            yield CsvRecord(lines.number, [], f"not CSV: {error}{how}")
            continue
        problem = next(filter(None, map(line_problem, lines.taken)), "")
        if fields or problem:
            yield CsvRecord(lines.number, fields, problem)


class _Lines:
    """The lines of a file for the csv module, of one record at a time."""

    def __init__(self, url: str) -> None:
        self._lines = text_lines(url)
        self._given_back: deque[str] = deque()
        self.number = 0
        """Lines taken so far."""
        self.taken: list[str] = []
        """Those of this record."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if len(self.taken) == MAX_RECORD_LINES:
            raise StopIteration  # an error for the csv module, which waits for a quote
        line = self._given_back.popleft() if self._given_back else next(self._lines)
        self.number += 1
        self.taken.append(line)
        return line

    def give_back(self) -> None:
        """Takes the lines of this record again, but for its first."""
        self.number -= len(self.taken) - 1
        self._given_back.extendleft(reversed(self.taken[1:]))
