"""Reads the rows of annotation files in every format."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from tvr.data_prep.annotations.clip_keys import (
    KEY_PATTERN,
    key_of,
    key_rule,
    name_hash,
    span_suffix,
)
from tvr.data_prep.annotations.parquet import parquet_rows
from tvr.data_prep.annotations.text_files import CsvRecord, csv_records, line_problem, text_lines
from tvr.data_prep.annotations.video_lookup import SUFFIXES
from tvr.data_prep.file_formats.caption_fields import captions_of, is_caption_field
from tvr.data_prep.file_formats.columns import TableColumns, delimiter_of, is_separator_line
from tvr.data_prep.file_formats.json_items import JsonItem, RepeatedFields, json_items
from tvr.data_prep.records import REFUSED_TEXT, VIDEO_ID_RULE, RefusedRow, is_video_id

ALLOWED = ("video", "captions", "caption", "key", "video_id", "start", "end")
# Fields of the DMAE authors' files. Neither their code nor this one needs sen_id, retrieval_key and
# label to identify captions and videos.
NAMED_ALLOWED = ("clip_name", "caption", "captions", "sen_id", "retrieval_key", "label")
MAX_SECONDS = 1e9
MAX_DETAIL = 500
"""Characters that are kept of what is wrong with a row."""

Row = TypeVar("Row")


@dataclass(slots=True, kw_only=True)
class Draft:
    """The content of one row."""

    key: str
    video: str
    video_id: str
    origin: str
    by_name: bool = False
    """True if `video` is a name to look up in the folder of videos."""
    captions: list[str] = field(default_factory=list)
    start_s: float = 0.0
    end_s: float | None = None
    key_hash: int = 0
    """Makes a key unique that was made from the file's name, see `row_hash`; 0 = a key of the
    row's own."""
    has_video_id: bool = True
    """False if `video_id` is the key for want of another one."""

    @property
    def source(self) -> tuple[object, ...]:
        """The fields that determine the clip's content."""
        return self.video, self.by_name, self.start_s, self.end_s


def annotation_rows(url: str) -> Iterator[Draft | RefusedRow]:
    """Yields the rows of a file in order. Raises as `read_annotations` for a file as a whole."""
    return READERS[file_format(url)](url)


def file_format(url: str) -> str:
    """Returns the format, of READERS, by the file's name. Raises ValueError for another name."""
    name = url.casefold().removesuffix(".gz").replace(".ndjson", ".jsonl")
    is_compressed = url.casefold().endswith(".gz")
    for extension in READERS:
        if name.endswith("." + extension) and not (extension == "parquet" and is_compressed):
            return extension
    raise ValueError(
        f"annotations={url!r}: unknown format; the name must end in .jsonl, .json, .csv or .tsv (or"
        " .gz of it), or in .parquet"
    )


def draft_or_refusal(
    parse: Callable[[Row, str], Draft], row: Row, origin: str
) -> Draft | RefusedRow:
    """Returns what `parse` makes of a row, or the row's refusal if it raises ValueError.

    Args:
        parse: Gets the row and its origin; its errors name the origin.
    """
    try:
        return parse(row, origin)
    except ValueError as error:
        return refused_row(origin, str(error))


def refused_row(origin: str, detail: str) -> RefusedRow:
    """Returns the refusal of a row; of a long `detail`, the start is kept."""
    if len(detail) > MAX_DETAIL:
        detail = f"{detail[:MAX_DETAIL]}..."
    # A field of the row may hold halves of UTF-16 pairs, which no file can store.
    return RefusedRow(origin=origin, detail=detail.encode("utf-8", "backslashreplace").decode())


def row_hash(video: str, start_s: float, end_s: float | None) -> int:
    """Returns the hash of a row's video, as the row names it, and its cut: `Draft.key_hash`."""
    return name_hash(f"{video}\0{start_s}\0{end_s}")


def _jsonl_rows(url: str) -> Iterator[Draft | RefusedRow]:
    for number, line in enumerate(text_lines(url), start=1):
        if not line.isspace():
            yield draft_or_refusal(_parse_line, line, f"{url}:{number}")


def _parse_line(line: str, origin: str) -> Draft:
    if problem := line_problem(line):
        raise ValueError(f"{origin}: {problem}")
    try:
        # Files that were put together have the mark of each file.
        value = _DECODER.decode(line.removeprefix("\ufeff").strip())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: not JSON: {error}") from error
    return _object_draft(value, origin)


def _object_draft(value: Any, origin: str) -> Draft:
    if not isinstance(value, dict):
        raise ValueError(f"{origin}: expected a JSON object, found {type(value).__name__}")
    return (_named_draft if "clip_name" in value else draft_of)(value, origin)


def _json_rows(url: str) -> Iterator[Draft | RefusedRow]:
    for item in json_items(url):
        yield draft_or_refusal(_item_draft, item, item.origin)


def _item_draft(item: JsonItem, origin: str) -> Draft:
    value = item.value
    if isinstance(value, RepeatedFields):
        raise ValueError(f"{origin}: a field occurs twice")
    if item.name is not None:
        fields = value if isinstance(value, dict) else {"captions": value}
        # A name is looked up; a path or URL is opened as it is.
        is_name = "://" not in item.name and not item.name.endswith(SUFFIXES)
        value = {"clip_name" if is_name else "video": item.name, **fields}
    return _object_draft(value, origin)


def _distinct_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field occurs twice")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct_fields)


def _named_draft(row: dict[str, Any], origin: str) -> Draft:
    """Parses a line of the authors' JSONL: a caption of a video given by name."""
    _check_fields(row, NAMED_ALLOWED, origin)
    name = row["clip_name"]
    if not isinstance(name, str) or not name:
        raise ValueError(f"{origin}: clip_name={name!r:.200} must be text")
    _check_video(name, "clip_name", origin)
    captions = _captions(row, origin)
    key = key_of(name)
    if not KEY_PATTERN.fullmatch(key):
        raise ValueError(f"{origin}: {key_rule(key)}")
    return Draft(
        key=key,
        video=name,
        video_id=key,
        origin=origin,
        captions=captions,
        by_name=True,
        key_hash=row_hash(name, 0.0, None),
        has_video_id=False,
    )


def _parquet_rows(url: str) -> Iterator[Draft | RefusedRow]:
    for number, row in enumerate(parquet_rows(url), start=1):
        origin = f"{url}: row {number}"
        if isinstance(row, str):
            yield refused_row(origin, f"{origin}: {row}")
        else:
            # A null caption is an empty caption, as in CSV.
            whole = row if any(map(is_caption_field, row)) else {"caption": "", **row}
            yield draft_or_refusal(draft_of, whole, origin)


def _csv_rows(url: str) -> Iterator[Draft | RefusedRow]:
    first = [*islice(text_lines(url), 2), ""]
    has_separator = is_separator_line(first[0])
    records = csv_records(url, delimiter=delimiter_of(first[has_separator], url))
    header = next(islice(records, int(has_separator), None), None)
    if header is None:
        return
    if header.problem:
        raise ValueError(f"{url}:{header.number}: {header.problem}")
    columns = TableColumns(header.fields, f"{url}:{header.number}")
    for record in records:
        if record.problem or not columns.is_empty(record.fields):
            parse = partial(_csv_draft, columns)
            yield draft_or_refusal(parse, record, f"{url}:{record.number}")


def _csv_draft(columns: TableColumns, record: CsvRecord, origin: str) -> Draft:
    if record.problem:
        raise ValueError(f"{origin}: {record.problem}")
    try:
        row = columns.row(record.fields)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    return draft_of(row, origin)


def check_record(record: CsvRecord, columns: list[str], origin: str) -> None:
    """Raises ValueError for a record that is no CSV, or has not one field a column."""
    if record.problem:
        raise ValueError(f"{origin}: {record.problem}")
    if len(record.fields) != len(columns):
        raise ValueError(f"{origin}: expected {len(columns)} fields ({', '.join(columns)})")


def draft_of(row: dict[str, Any], origin: str) -> Draft:
    """Checks the fields ALLOWED of a row.

    Raises:
        ValueError: a field is missing, unknown or wrong; the message has the origin.
    """
    _check_fields(row, ALLOWED, origin)
    captions = _captions(row, origin)
    for name in ("video", "key", "video_id"):
        value = row.get(name, "-" if name != "video" else "")
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"{origin}: {name}={value!r:.200} must be a text with at least one character"
            )
    _check_video(row["video"], "video", origin)
    if not is_video_id(row.get("video_id", "-")):
        raise ValueError(f"{origin}: video_id={row['video_id']!r:.200} must be {VIDEO_ID_RULE}")
    start_s, end_s = _span(row, origin)
    own_key = row.get("key")
    key = own_key or key_of(row["video"], span_suffix(start_s, end_s))
    if not KEY_PATTERN.fullmatch(key):
        raise ValueError(f"{origin}: {key_rule(key)}")
    return Draft(
        key=key,
        video=row["video"],
        video_id=row.get("video_id", key),
        origin=origin,
        captions=captions,
        start_s=start_s,
        end_s=end_s,
        key_hash=0 if own_key else row_hash(row["video"], start_s, end_s),
        has_video_id="video_id" in row,
    )


def _span(row: dict[str, Any], origin: str) -> tuple[float, float | None]:
    """Returns the cut of a row in seconds; CSV stores it as text."""
    seconds: dict[str, float] = {}
    for name in ("start", "end"):
        value = row.get(name)
        if value is not None:
            try:
                seconds[name] = float(value) if not isinstance(value, bool) else math.nan
            except (TypeError, ValueError, OverflowError):
                seconds[name] = math.nan
            if not abs(seconds[name]) <= MAX_SECONDS:
                raise ValueError(f"{origin}: {name}={value!r:.200} must be a number of seconds")
    start_s, end_s = seconds.get("start", 0.0), seconds.get("end")
    if not 0 <= start_s < (math.inf if end_s is None else end_s):
        raise ValueError(f"{origin}: start={start_s} and end={end_s} must be 0 <= start < end")
    return start_s, end_s


def _check_video(video: str, name: str, origin: str) -> None:
    if REFUSED_TEXT.search(video):
        raise ValueError(f"{origin}: {name}={video!r:.200} must have no control character")


def _captions(row: dict[str, Any], origin: str) -> list[str]:
    try:
        captions = captions_of(row)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    for caption in captions:
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{origin}: caption={caption!r:.200} is no valid Unicode: it has half of a UTF-16"
                " pair"
            ) from error
    return captions


def _check_fields(row: dict[str, Any], allowed: tuple[str, ...], origin: str) -> None:
    unknown = sorted(name for name in set(row) - set(allowed) if not is_caption_field(name))
    if unknown:
        raise ValueError(
            f"{origin}: unknown {', '.join(unknown)}; allowed are {', '.join(allowed)}"
        )


READERS: dict[str, Callable[[str], Iterator[Draft | RefusedRow]]] = {
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "csv": _csv_rows,
    "tsv": _csv_rows,
    "parquet": _parquet_rows,
}
"""Readers by the extension of files."""
