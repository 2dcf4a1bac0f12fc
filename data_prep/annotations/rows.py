"""Reads the rows of annotation files in every format."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
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
from tvr.data_prep.records import REFUSED_TEXT, VIDEO_ID_RULE, RefusedRow, is_video_id

ALLOWED = ("video", "captions", "caption", "key", "video_id", "start", "end")
CSV_ALLOWED = ("video", "caption", "key", "video_id", "start", "end")
# Fields of the DMAE authors' files. Neither their code nor this one needs sen_id, retrieval_key and
# label to identify captions and videos.
NAMED_ALLOWED = ("clip_name", "caption", "sen_id", "retrieval_key", "label")
FORMATS = ("jsonl", "csv", "parquet")
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
    readers = {"jsonl": _jsonl_rows, "csv": _csv_rows, "parquet": _parquet_rows}
    return readers[file_format(url)](url)


def file_format(url: str) -> str:
    """Returns the format, of FORMATS, by the file's name. Raises ValueError for another name."""
    name = url.removesuffix(".gz")
    for extension in FORMATS:
        if name.endswith("." + extension) and not (extension == "parquet" and name != url):
            return extension
    raise ValueError(
        f"annotations={url!r}: unknown format; the name must end in .jsonl or .csv (or .gz of it),"
        " or in .parquet"
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
    if not isinstance(value, dict):
        raise ValueError(f"{origin}: expected a JSON object, found {type(value).__name__}")
    return (_named_draft if "clip_name" in value else draft_of)(value, origin)


def _distinct_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field occurs twice")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct_fields)


def _named_draft(row: dict[str, Any], origin: str) -> Draft:
    """Parses a line of the authors' JSONL: one caption of a video given by name."""
    _check_fields(row, NAMED_ALLOWED, origin)
    name, caption = row["clip_name"], row.get("caption")
    if not isinstance(name, str) or not name or not isinstance(caption, str):
        raise ValueError(
            f"{origin}: clip_name={name!r:.200} and caption={caption!r:.200} must be text"
        )
    _check_video(name, "clip_name", origin)
    _check_captions([caption], origin)
    key = key_of(name)
    if not KEY_PATTERN.fullmatch(key):
        raise ValueError(f"{origin}: {key_rule(key)}")
    return Draft(
        key=key,
        video=name,
        video_id=key,
        origin=origin,
        captions=[caption],
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
            whole = row if "captions" in row else {"caption": "", **row}
            yield draft_or_refusal(draft_of, whole, origin)


def _csv_rows(url: str) -> Iterator[Draft | RefusedRow]:
    records = csv_records(url)
    header = next(records, None)
    if header is None:
        return
    if header.problem:
        raise ValueError(f"{url}:{header.number}: {header.problem}")
    columns = header.fields
    is_known = set(columns) <= set(CSV_ALLOWED) and len(set(columns)) == len(columns)
    if not is_known or not {"video", "caption"} <= set(columns):
        raise ValueError(
            f"{url}:{header.number}: columns {', '.join(columns)[:MAX_DETAIL]}; expected video,"
            " caption and optionally key, video_id, start, end"
        )
    parse = partial(_csv_draft, columns)
    for record in records:
        yield draft_or_refusal(parse, record, f"{url}:{record.number}")


def _csv_draft(columns: list[str], record: CsvRecord, origin: str) -> Draft:
    check_record(record, columns, origin)
    row = zip(columns, record.fields, strict=True)
    return draft_of({name: value for name, value in row if value or name == "caption"}, origin)


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
    if ("captions" in row) == ("caption" in row):
        raise ValueError(f'{origin}: give either "captions" (a list) or "caption" (one text)')
    captions = row["captions"] if "captions" in row else [row["caption"]]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{origin}: captions={captions!r:.200} must be text")
    for name in ("video", "key", "video_id"):
        value = row.get(name, "-" if name != "video" else "")
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"{origin}: {name}={value!r:.200} must be a text with at least one character"
            )
    _check_video(row["video"], "video", origin)
    _check_captions(captions, origin)
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


def _check_captions(captions: list[str], origin: str) -> None:
    for caption in captions:
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{origin}: caption={caption!r:.200} is no valid Unicode: it has half of a UTF-16"
                " pair"
            ) from error


def _check_fields(row: dict[str, Any], allowed: tuple[str, ...], origin: str) -> None:
    unknown = sorted(set(row) - set(allowed))
    if unknown:
        raise ValueError(
            f"{origin}: unknown {', '.join(unknown)}; allowed are {', '.join(allowed)}"
        )
