"""Reads the rows of annotation files in every format."""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec

from tvr.data_prep.annotations.clip_keys import KEY_PATTERN, key_of, key_rule, span_suffix
from tvr.data_prep.annotations.parquet import parquet_rows
from tvr.data_prep.records import REFUSED_TEXT, VIDEO_ID_RULE, is_video_id

ALLOWED = ("video", "captions", "caption", "key", "video_id", "start", "end")
CSV_ALLOWED = ("video", "caption", "key", "video_id", "start", "end")
# Fields of the DMAE authors' files. Neither their code nor this one needs sen_id, retrieval_key and
# label to identify captions and videos.
NAMED_ALLOWED = ("clip_name", "caption", "sen_id", "retrieval_key", "label")
FORMATS = ("jsonl", "csv", "parquet")


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


def text_lines(url: str) -> Iterator[str]:
    """Yields text lines, without the byte-order mark that spreadsheets write."""
    try:
        with fsspec.open(url, "rt", compression="infer", encoding="utf-8-sig", newline="") as file:
            yield from file
    except FileNotFoundError as error:
        raise FileNotFoundError(f"annotation file {url} does not exist") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{url}: not UTF-8 text: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{url}: a damaged or truncated gzip file: {error}") from error


def _jsonl_rows(url: str) -> Iterator[Draft]:
    for number, line in enumerate(text_lines(url), start=1):
        if not line.strip():
            continue
        origin = f"{url}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{origin}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{origin}: expected a JSON object, found {type(value).__name__}")
        yield (_named_draft if "clip_name" in value else _draft)(value, origin)


def _named_draft(row: dict[str, Any], origin: str) -> Draft:
    """Parses a line of the authors' JSONL: one caption of a video given by name."""
    _check_fields(row, NAMED_ALLOWED, origin)
    name, caption = row["clip_name"], row.get("caption")
    if not isinstance(name, str) or not name or not isinstance(caption, str):
        raise ValueError(f"{origin}: clip_name={name!r} and caption={caption!r} must be text")
    _check_video(name, "clip_name", origin)
    _check_captions([caption], origin)
    key = key_of(name)
    if not KEY_PATTERN.fullmatch(key):
        raise ValueError(f"{origin}: {key_rule(key)}")
    return Draft(key=key, video=name, video_id=key, origin=origin, captions=[caption], by_name=True)


def _parquet_rows(url: str) -> Iterator[Draft]:
    for number, row in enumerate(parquet_rows(url), start=1):
        # A null caption is an empty caption, as in CSV.
        yield _draft(row if "captions" in row else {"caption": "", **row}, f"{url}: row {number}")


def _csv_rows(url: str) -> Iterator[Draft]:
    reader = csv.DictReader(text_lines(url), strict=True)
    try:
        columns = reader.fieldnames or ()
        unknown = sorted(set(columns) - set(CSV_ALLOWED))
        if columns and (unknown or not {"video", "caption"} <= set(columns)):
            raise ValueError(
                f"{url}:1: columns {', '.join(columns)}; expected video, caption and optionally"
                " key, video_id, start, end"
            )
        for row in reader:
            origin = f"{url}:{reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{origin}: expected {len(columns)} fields ({', '.join(columns)})")
            yield _draft(
                {name: value for name, value in row.items() if value or name == "caption"}, origin
            )
    except csv.Error as error:
        # line_num is the last line of the last complete row.
        raise ValueError(f"{url}:{reader.line_num + 1}: not CSV: {error}") from error


def _draft(row: dict[str, Any], origin: str) -> Draft:
    _check_fields(row, ALLOWED, origin)
    if ("captions" in row) == ("caption" in row):
        raise ValueError(f'{origin}: give either "captions" (a list) or "caption" (one text)')
    captions = row["captions"] if "captions" in row else [row["caption"]]
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{origin}: captions={captions!r} must be text")
    for name in ("video", "key", "video_id"):
        value = row.get(name, "-" if name != "video" else "")
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"{origin}: {name}={value!r} must be a text with at least one character"
            )
    _check_video(row["video"], "video", origin)
    _check_captions(captions, origin)
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


def _check_captions(captions: list[str], origin: str) -> None:
    for caption in captions:
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{origin}: caption={caption!r} is no valid Unicode: it has half of a UTF-16 pair"
            ) from error


def _check_fields(row: dict[str, Any], allowed: tuple[str, ...], origin: str) -> None:
    unknown = sorted(set(row) - set(allowed))
    if unknown:
        raise ValueError(
            f"{origin}: unknown {', '.join(unknown)}; allowed are {', '.join(allowed)}"
        )
