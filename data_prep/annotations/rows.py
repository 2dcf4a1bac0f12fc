"""Reads the rows of annotation files in every format."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from tvr.data_prep.annotations.caption_fields import captions_of, is_caption_field
from tvr.data_prep.annotations.clip_keys import KEY_PATTERN, key_of, key_rule, span_suffix
from tvr.data_prep.annotations.columns import TableColumns, delimiter_of, is_separator_line
from tvr.data_prep.annotations.json_items import json_items
from tvr.data_prep.annotations.parquet import parquet_rows
from tvr.data_prep.annotations.text_encoding import open_text
from tvr.data_prep.annotations.video_lookup import SUFFIXES
from tvr.data_prep.records import REFUSED_TEXT, VIDEO_ID_RULE, is_video_id

ALLOWED = ("video", "captions", "caption", "key", "video_id", "start", "end")
# Fields of the DMAE authors' files. Neither their code nor this one needs sen_id, retrieval_key and
# label to identify captions and videos.
NAMED_ALLOWED = ("clip_name", "caption", "captions", "sen_id", "retrieval_key", "label")


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

    @property
    def source(self) -> tuple[object, ...]:
        """The fields that determine the clip's content."""
        return self.video, self.by_name, self.start_s, self.end_s


def annotation_rows(url: str) -> Iterator[Draft]:
    """Yields the rows of a file in order. Raises as `read_annotations`."""
    return READERS[file_format(url)](url)


def file_format(url: str) -> str:
    """Returns the format, of READERS, by the file's name. Raises ValueError for another name."""
    name = url.removesuffix(".gz")
    for extension in READERS:
        if name.endswith("." + extension) and not (extension == "parquet" and name != url):
            return extension
    raise ValueError(
        f"annotations={url!r}: unknown format; the name must end in .jsonl, .json, .csv or .tsv (or"
        " .gz of it), or in .parquet"
    )


def text_lines(url: str) -> Iterator[str]:
    """Yields text lines, without the byte-order mark that spreadsheets write."""
    with open_text(url) as file:
        yield from file


def _jsonl_rows(url: str) -> Iterator[Draft]:
    for number, line in enumerate(text_lines(url), start=1):
        if not line.strip():
            continue
        origin = f"{url}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{origin}: not JSON: {error}") from error
        yield _object_draft(value, origin)


def _json_rows(url: str) -> Iterator[Draft]:
    for item in json_items(url):
        value = item.value
        if item.name is not None:
            fields = value if isinstance(value, dict) else {"captions": value}
            # A name is looked up; a path or URL is opened as it is.
            is_name = "://" not in item.name and not item.name.endswith(SUFFIXES)
            value = {"clip_name" if is_name else "video": item.name, **fields}
        yield _object_draft(value, item.origin)


def _object_draft(value: Any, origin: str) -> Draft:
    if not isinstance(value, dict):
        raise ValueError(f"{origin}: expected a JSON object, found {type(value).__name__}")
    return (_named_draft if "clip_name" in value else _draft)(value, origin)


def _named_draft(row: dict[str, Any], origin: str) -> Draft:
    """Parses a line of the authors' JSONL: a caption of a video given by name."""
    _check_fields(row, NAMED_ALLOWED, origin)
    name = row["clip_name"]
    if not isinstance(name, str) or not name:
        raise ValueError(f"{origin}: clip_name={name!r} must be text")
    _check_video(name, "clip_name", origin)
    captions = _captions(row, origin)
    key = key_of(name)
    if not KEY_PATTERN.fullmatch(key):
        raise ValueError(f"{origin}: {key_rule(key)}")
    return Draft(key=key, video=name, video_id=key, origin=origin, captions=captions, by_name=True)


def _parquet_rows(url: str) -> Iterator[Draft]:
    for number, row in enumerate(parquet_rows(url), start=1):
        # A null caption is an empty caption, as in CSV.
        has_captions = any(map(is_caption_field, row))
        yield _draft(row if has_captions else {"caption": "", **row}, f"{url}: row {number}")


def _csv_rows(url: str) -> Iterator[Draft]:
    lines = text_lines(url)
    skipped = list(islice(lines, 1))
    skipped += islice(lines, 1) if skipped and is_separator_line(skipped[0]) else ()
    if not skipped:
        return
    number, delimiter = len(skipped), delimiter_of(skipped[-1], url)
    last = number
    reader = csv.reader(chain(skipped[-1:], lines), delimiter=delimiter, strict=True)
    try:
        columns = TableColumns(next(reader), f"{url}:{number}")
        for fields in reader:
            last = number - 1 + reader.line_num
            origin = f"{url}:{last}"
            try:
                row = columns.row(fields) if fields else None
            except ValueError as error:
                raise ValueError(f"{origin}: {error}") from error
            if row is not None:
                yield _draft(row, origin)
    except csv.Error as error:
        # The row begins after the last complete one.
        raise ValueError(f"{url}:{last + 1}: not CSV: {error}") from error


def _draft(row: dict[str, Any], origin: str) -> Draft:
    _check_fields(row, ALLOWED, origin)
    captions = _captions(row, origin)
    for name in ("video", "key", "video_id"):
        value = row.get(name, "-" if name != "video" else "")
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"{origin}: {name}={value!r} must be a text with at least one character"
            )
    _check_video(row["video"], "video", origin)
    if not is_video_id(row.get("video_id", "-")):
        raise ValueError(f"{origin}: video_id={row['video_id']!r} must be {VIDEO_ID_RULE}")
    start_s, end_s = _span(row, origin)
    key = row.get("key") or key_of(row["video"]) + span_suffix(start_s, end_s)
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
            if not math.isfinite(seconds[name]):
                raise ValueError(f"{origin}: {name}={value!r} must be a number of seconds")
    start_s, end_s = seconds.get("start", 0.0), seconds.get("end")
    if not 0 <= start_s < (math.inf if end_s is None else end_s):
        raise ValueError(f"{origin}: start={start_s} and end={end_s} must be 0 <= start < end")
    return start_s, end_s


def _check_video(video: str, name: str, origin: str) -> None:
    if REFUSED_TEXT.search(video):
        raise ValueError(f"{origin}: {name}={video!r} must have no control character")


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
                f"{origin}: caption={caption!r} is no valid Unicode: it has half of a UTF-16 pair"
            ) from error
    return captions


def _check_fields(row: dict[str, Any], allowed: tuple[str, ...], origin: str) -> None:
    unknown = sorted(name for name in set(row) - set(allowed) if not is_caption_field(name))
    if unknown:
        raise ValueError(
            f"{origin}: unknown {', '.join(unknown)}; allowed are {', '.join(allowed)}"
        )


READERS: dict[str, Callable[[str], Iterator[Draft]]] = {
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "csv": _csv_rows,
    "tsv": _csv_rows,
    "parquet": _parquet_rows,
}
"""Readers by the extension of files."""
