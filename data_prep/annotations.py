"""Annotation files -> clips: JSONL with one video or one caption a line, CSV or Parquet with one
caption a row."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec

from tvr.data_prep.parquet import parquet_rows
from tvr.data_prep.records import Clip
from tvr.data_prep.video_files import VideoFiles

ALLOWED = ("video", "captions", "caption", "key", "video_id", "start", "end")
CSV_ALLOWED = ("video", "caption", "key", "video_id", "start", "end")
# The lines of the DMAE authors' code. It needs neither sen_id nor retrieval_key nor label to tell
# captions and videos apart, and neither does this.
NAMED_ALLOWED = ("clip_name", "caption", "sen_id", "retrieval_key", "label")
FORMATS = ("jsonl", "csv", "parquet")
# A tar member is KEY.extension within USTAR's 100 bytes, and WebDataset splits it at the first dot.
MAX_KEY_LENGTH = 80
KEY_PATTERN = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}")


def read_annotations(url: str, *, videos: str | None = None) -> list[Clip]:
    """Reads clips in file order from a .jsonl, .csv (also .gz) or .parquet file at a path or fsspec
    URL.

    JSONL: {"video": ..., "captions": [...] or "caption": "...", optional "key", "video_id",
    "start", "end"}.
    Or {"clip_name": ..., "caption": ...}: the video is searched by that name among the videos, and
    the lines of one name are merged in file order.
    CSV: columns video, caption, optional key, video_id, start, end; rows of one clip are merged in
    file order.
    Parquet: the same, and a column captions of lists instead of or beside caption.
    "start" and "end" cut the clip out of its video, in seconds. Relative video paths resolve
    against `videos`, or else the annotation file's folder. Without "key" the video's file name is
    used, of a cut with its milliseconds as NAME_START_END, without "video_id" the key. Empty
    captions are kept here; packing counts them.

    Raises:
        FileNotFoundError: no such annotation file, or folder of videos to search.
        ImportError: a .parquet file without pyarrow.
        ValueError: malformed file, named as file:line; an annotation without clips; a duplicate
            key.
    """
    base = videos if videos is not None else _parent(url)
    readers = {"jsonl": _jsonl_rows, "csv": _csv_rows, "parquet": _parquet_rows}
    rows = readers[_file_format(url)](url)
    drafts: dict[str, _Draft] = {}
    merge = _file_format(url) != "jsonl"
    for row in rows:
        first = drafts.get(row.key)
        if first is None:
            drafts[row.key] = row
        elif (merge or row.by_name) and first.source == row.source:
            _merge(first, row)
        else:
            raise ValueError(
                f"{row.origin}: duplicate key {row.key!r}, first at {first.origin}; give each clip"
                ' its own "key" (without one it comes from the video\'s file name)'
            )
    if not drafts:
        raise ValueError(
            f"{url}: empty annotation, no clip in it; expected one JSON object or CSV row a clip"
        )
    files = VideoFiles(base) if any(draft.by_name for draft in drafts.values()) else None
    return [_clip(draft, base, files) for draft in drafts.values()]


@dataclass(slots=True, kw_only=True)
class _Draft:
    key: str
    video: str
    video_id: str
    origin: str
    by_name: bool = False
    """`video` is a name to search for."""
    captions: list[str] = field(default_factory=list)
    start_s: float = 0.0
    end_s: float | None = None

    @property
    def source(self) -> tuple[object, ...]:
        """What a clip shows."""
        return self.video, self.by_name, self.start_s, self.end_s


def _clip(draft: _Draft, base: str, files: VideoFiles | None) -> Clip:
    if draft.by_name:
        assert files is not None
        video = files.find(draft.video) or files.expected(draft.video)
    else:
        video = _resolve(draft.video, base)
    return Clip(
        key=draft.key,
        video=video,
        captions=tuple(draft.captions),
        video_id=draft.video_id,
        origin=draft.origin,
        start_s=draft.start_s,
        end_s=draft.end_s,
    )


def _merge(first: _Draft, row: _Draft) -> None:
    if first.video_id != row.video_id:
        raise ValueError(
            f"{row.origin}: video_id={row.video_id!r} differs from {first.video_id!r} of the same"
            f" video at {first.origin}"
        )
    first.captions.extend(row.captions)


def _file_format(url: str) -> str:
    name = url.removesuffix(".gz")
    for extension in FORMATS:
        if name.endswith("." + extension) and not (extension == "parquet" and name != url):
            return extension
    raise ValueError(
        f"annotations={url!r}: unknown format; the name must end in .jsonl or .csv (or .gz of it),"
        " or in .parquet"
    )


def text_lines(url: str) -> Iterator[str]:
    """Text lines, without the byte-order mark that spreadsheets write."""
    try:
        with fsspec.open(url, "rt", compression="infer", encoding="utf-8-sig", newline="") as file:
            yield from file
    except FileNotFoundError as error:
        raise FileNotFoundError(f"annotation file {url} does not exist") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{url}: not UTF-8 text: {error}") from error


def _jsonl_rows(url: str) -> Iterator[_Draft]:
    for number, line in enumerate(text_lines(url), start=1):
        if not line.strip():
            continue
        origin = f"{url}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{origin}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{origin}: expected a JSON object, found {type(value).__name__}")
        yield (_named_draft if "clip_name" in value else _draft)(value, origin)


def _named_draft(row: dict[str, Any], origin: str) -> _Draft:
    """A line of the authors' JSONL: one caption of a video that is named without its file."""
    _check_fields(row, NAMED_ALLOWED, origin)
    name, caption = row["clip_name"], row.get("caption")
    if not isinstance(name, str) or not name or not isinstance(caption, str):
        raise ValueError(f"{origin}: clip_name={name!r} and caption={caption!r} must be text")
    key = key_of(name)
    if not KEY_PATTERN.fullmatch(key):
        raise ValueError(f"{origin}: {key_rule(key)}")
    return _Draft(
        key=key, video=name, video_id=key, origin=origin, captions=[caption], by_name=True
    )


def _parquet_rows(url: str) -> Iterator[_Draft]:
    for number, row in enumerate(parquet_rows(url), start=1):
        # A row without caption is an empty caption, as in CSV.
        yield _draft(row if "captions" in row else {"caption": "", **row}, f"{url}: row {number}")


def _csv_rows(url: str) -> Iterator[_Draft]:
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
        # line_num is the last line of the last whole row.
        raise ValueError(f"{url}:{reader.line_num + 1}: not CSV: {error}") from error


def _draft(row: dict[str, Any], origin: str) -> _Draft:
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
    start_s, end_s = _span(row, origin)
    key = row.get("key") or key_of(row["video"]) + _span_suffix(start_s, end_s)
    if not KEY_PATTERN.fullmatch(key):
        raise ValueError(f"{origin}: {key_rule(key)}")
    return _Draft(
        key=key,
        video=row["video"],
        video_id=row.get("video_id", key),
        origin=origin,
        captions=captions,
        start_s=start_s,
        end_s=end_s,
    )


def _span(row: dict[str, Any], origin: str) -> tuple[float, float | None]:
    """The cut of a row in seconds; CSV has it as text."""
    seconds: dict[str, float] = {}
    for name in ("start", "end"):
        value = row.get(name)
        if value is not None:
            try:
                seconds[name] = float(value) if not isinstance(value, bool) else math.nan
            except (TypeError, ValueError):
                seconds[name] = math.nan
            if not math.isfinite(seconds[name]):
                raise ValueError(f"{origin}: {name}={value!r} must be a number of seconds")
    start_s, end_s = seconds.get("start", 0.0), seconds.get("end")
    if not 0 <= start_s < (math.inf if end_s is None else end_s):
        raise ValueError(f"{origin}: start={start_s} and end={end_s} must be 0 <= start < end")
    return start_s, end_s


def _span_suffix(start_s: float, end_s: float | None) -> str:
    """What tells the cuts of one file apart in their keys."""
    if start_s == 0 and end_s is None:
        return ""
    return f"_{round(1000 * start_s)}_{'end' if end_s is None else round(1000 * end_s)}"


def _check_fields(row: dict[str, Any], allowed: tuple[str, ...], origin: str) -> None:
    unknown = sorted(set(row) - set(allowed))
    if unknown:
        raise ValueError(
            f"{origin}: unknown {', '.join(unknown)}; allowed are {', '.join(allowed)}"
        )


def key_rule(key: str) -> str:
    """The sentence that refuses a key."""
    return f'key={key!r} must be 1 to {MAX_KEY_LENGTH} letters, digits, "_" or "-"'


def key_of(video: str) -> str:
    """The key of a video's file name: without its extension, every other character as "_"."""
    stem = video.rstrip("/").rsplit("/", 1)[-1]
    stem = stem.rsplit(".", 1)[0] if "." in stem[1:] else stem
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem)


def _resolve(video: str, base: str) -> str:
    if "://" in video or video.startswith("/") or not base:
        return video
    return f"{base.rstrip('/')}/{video}"


def _parent(url: str) -> str:
    """The folder of a file at a path or URL; "" for the current one."""
    folder, slash, _ = url.rpartition("/")
    return folder + "/" if slash else ""
