"""The columns of tables in text files, .csv and .tsv: what their header says.

- A .tsv file has tabs between its fields. A .csv file has commas, semicolons or tabs: the
  character by which the header has a column `video` and a column of captions. A first line
  `sep=;`, which spreadsheets write, is passed over.
- White space around the names of columns is dropped, and capitals are as small letters. Columns
  without a name at the end of the header must be empty in each row, and a row without any text is
  passed over.
- Several columns may hold captions: a repeated `caption`, and `caption_1`, `caption_2`, ..., see
  `caption_fields`.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tvr.data_prep.file_formats.caption_fields import (
    CAPTION_FIELDS,
    NUMBERED,
    cell_value,
    is_caption_field,
)

DELIMITERS = (",", ";", "\t")
COLUMNS = ("video", "key", "video_id", "start", "end")
SEPARATOR_LINE = re.compile(r"\s*sep=(.)\s*", re.DOTALL)


def is_separator_line(line: str) -> bool:
    """True for the line that tells spreadsheets the separator of a table."""
    return SEPARATOR_LINE.fullmatch(line.rstrip("\r\n")) is not None


def delimiter_of(header: str, url: str) -> str:
    """Returns the character between the fields of a table.

    Args:
        header: Line with the names of the columns.
        url: File of the table; one of .tsv has tabs.
    """
    if url.casefold().removesuffix(".gz").endswith(".tsv"):
        return "\t"
    for delimiter in DELIMITERS:
        names = _names(header, delimiter)
        if "video" in names and any(map(is_caption_field, names)):
            return delimiter
    return ","  # the error about its columns is the plainest


def _names(header: str, delimiter: str) -> list[str]:
    try:
        names = next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error:
        return []
    return [name.strip().casefold() for name in names]


class TableColumns:
    """The columns of a table.

    Args:
        header: Names of the columns.
        where: Location of the header, for errors.

    Raises:
        ValueError: a column is missing, unknown or there twice.
    """

    def __init__(self, header: Sequence[str], where: str) -> None:
        names = [name.strip().casefold() for name in header]
        while names and not names[-1]:
            names.pop()
        captions = [name for name in names if is_caption_field(name)]
        repeated = [
            name for name, count in Counter(names).items() if count > 1 and name != "caption"
        ]
        unknown = set(names) - set(COLUMNS) - set(captions)
        both = set(CAPTION_FIELDS) <= set(names)
        if unknown or repeated or both or not captions or "video" not in names:
            raise ValueError(
                f"{where}: columns {', '.join(names)}; expected video, caption (or captions, or"
                " caption_1, caption_2, ...) and optionally key, video_id, start, end, each once"
            )
        self.names = names
        self._num_fields = len(header)
        self._others = [(at, name) for at, name in enumerate(names) if name in COLUMNS]
        numbered = [
            (int(match[1]), at)
            for at, name in enumerate(names)
            if (match := NUMBERED.fullmatch(name)) is not None
        ]
        self._captions = [at for at, name in enumerate(names) if name in CAPTION_FIELDS]
        self._captions += [at for _, at in sorted(numbered)]

    def is_empty(self, fields: Sequence[str]) -> bool:
        """True for a row without any text."""
        return len(fields) > 1 and not any(field.strip() for field in fields)

    def row(self, fields: Sequence[str]) -> dict[str, Any]:
        """Returns the fields of a row by name, its captions as a list.

        Raises:
            ValueError: the row has another number of fields, or a caption is no text.
        """
        if len(fields) != self._num_fields or any(fields[len(self.names) :]):
            raise ValueError(f"expected {len(self.names)} fields ({', '.join(self.names)})")
        row: dict[str, Any] = {name: fields[at] for at, name in self._others if fields[at]}
        texts: list[str] = []
        for at in self._captions:
            value = cell_value(fields[at])
            values = [value] if isinstance(value, str) else value
            texts += [text for text in values if text is not None]
        if len(self._captions) > 1:
            texts = [text for text in texts if text.strip()] or [""]
        return row | {"captions": texts}
