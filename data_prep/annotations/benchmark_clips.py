"""Reads published files that list clips themselves: VATEX, LSMDC, YouCook2 and WebVid.

Each reader yields the clips of one split in file order, without looking for their videos. A row
that is no clip is yielded as a `RefusedRow`, and the rows around it are used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvr.data_prep.annotations.benchmark_files import read_json
from tvr.data_prep.annotations.rows import MAX_DETAIL, check_record, refused_row
from tvr.data_prep.annotations.text_files import csv_records, line_problem, text_lines
from tvr.data_prep.records import RefusedRow

# YouTube's id, start and end in seconds: a clip of ten seconds that was cut out already.
VATEX_ID = re.compile(r"(.{11})_(\d{6})_(\d{6})")
# The clip's place in its movie, such as "_00.00.51.926-00.00.54.129".
LSMDC_PLACE = re.compile(r"_\d\d\.\d\d\.\d\d\.\d{3}-\d\d\.\d\d\.\d\d\.\d{3}$")
LSMDC_FIELDS = 6
WEBVID_COLUMNS = ("videoid", "page_dir", "name")

Span = tuple[float, float | None]
WHOLE: Span = (0.0, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedClip:
    """A clip of a published file."""

    name: str
    """Its published id; unique in the split."""
    captions: tuple[str, ...]
    files: tuple[tuple[str, Span], ...]
    """Where its video may be, in this order: names to look up, and the cut of the clip in it."""
    origin: str
    """Location of the clip, "file:place"."""


ClipRow = PublishedClip | RefusedRow


def vatex_clips(url: str) -> Iterator[ClipRow]:
    """Reads vatex_*.json: [{"videoID": "ID_SSSSSS_EEEEEE", "enCap": [10 texts], "chCap": ...}].

    The English captions are used. The file of a clip has the clip's id; without one, the clip is
    cut out of the file of its YouTube video.
    """
    for number, entry in enumerate(read_json(url, list)):
        where = f"{url}: [{number}]"
        fields = entry if isinstance(entry, dict) else {}
        name, captions = fields.get("videoID"), fields.get("enCap")
        if not isinstance(name, str) or not name:
            yield _refused(where, f"videoID={name!r} must be text")
        elif not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
            yield _refused(where, f"{name}: enCap={captions!r:.200} must be a list of texts")
        else:
            files: tuple[tuple[str, Span], ...] = ((name, WHOLE),)
            match = VATEX_ID.fullmatch(name)
            if match is not None and int(match[2]) < int(match[3]):
                files += ((match[1], (float(match[2]), float(match[3]))),)
            yield PublishedClip(name=name, captions=tuple(captions), files=files, origin=where)


def lsmdc_clips(url: str) -> Iterator[ClipRow]:
    """Reads LSMDC16_annos_*.csv: lines of six fields with tabs between, without header.

    They are clip id, start and end as aligned, start and end as extracted, and the sentence. The
    clips are extracted already; they lie in a folder for each movie, MOVIE/CLIP.avi.
    """
    for number, line in enumerate(text_lines(url), start=1):
        where, fields = f"{url}:{number}", line.rstrip("\r\n").split("\t")
        if not line.strip():
            continue
        if problem := line_problem(line):
            yield _refused(where, problem)
            continue
        if len(fields) != LSMDC_FIELDS or not fields[0].strip():
            found = f"{len(fields)} fields, must be {LSMDC_FIELDS} with tabs between"
            yield _refused(where, f"{found}: {line!r:.200}")
            continue
        name = fields[0].strip()
        movie = LSMDC_PLACE.sub("", name)
        yield PublishedClip(
            name=name,
            captions=(fields[-1].strip(),),
            files=((f"{movie}/{name}", WHOLE), (name, WHOLE)),
            origin=where,
        )


def youcook2_clips(url: str, subset: str) -> Iterator[ClipRow]:
    """Reads youcookii_annotations_trainval.json; each segment is a clip of its video.

    {"database": {ID: {"subset", "recipe_type", "annotations": [{"id", "segment": [start, end],
    "sentence"}], ...}}}. A video's file lies in the folder of videos, or in SUBSET/RECIPE, as the
    authors' script puts it.
    """
    database = read_json(url, dict).get("database")
    if not isinstance(database, dict):
        raise ValueError(f"{url}: database must be an object, found {type(database).__name__}")
    for video, entry in database.items():
        where = f"{url}: {video}"
        fields = entry if isinstance(entry, dict) else {}
        if isinstance(fields.get("subset"), str) and fields["subset"] != subset:
            continue
        annotations = fields.get("annotations")
        if not isinstance(annotations, list) or not isinstance(fields.get("subset"), str):
            subset_of = f"subset={fields.get('subset')!r:.50}"
            yield _refused(where, f"{subset_of} must be text, annotations must be a list")
            continue
        folder = f"{subset}/{fields.get('recipe_type')}/{video}"
        for number, annotation in enumerate(annotations):
            yield _segment(annotation, number, video, folder, f"{where}[{number}]")


def _segment(annotation: Any, number: int, video: str, folder: str, where: str) -> ClipRow:
    fields = annotation if isinstance(annotation, dict) else {}
    segment, sentence = fields.get("segment"), fields.get("sentence")
    is_span = (
        isinstance(segment, list)
        and len(segment) == 2
        and all(type(value) in (int, float) and math.isfinite(value) for value in segment)
        and 0 <= segment[0] < segment[1]
    )
    if not is_span or not isinstance(sentence, str):
        problem = f"segment={segment!r:.100} must be 0 <= start < end, sentence={sentence!r:.100}"
        return _refused(where, f"{problem} text")
    span: Span = (float(segment[0]), float(segment[1]))  # type: ignore[index]
    identifier = fields.get("id", number)  # begins at 0 in each video
    return PublishedClip(
        name=f"{video}_{identifier}",
        captions=(sentence.strip(),),
        files=((video, span), (folder, span)),
        origin=where,
    )


def webvid_clips(url: str) -> Iterator[ClipRow]:
    """Reads results_*.csv with the columns videoid, contentUrl, duration, page_dir and name.

    A video's file is PAGE_DIR/VIDEOID.mp4, or VIDEOID.mp4 in some folder. The caption is the name.
    """
    records = csv_records(url)
    header = next(records, None)
    found = [] if header is None else [name.strip() for name in header.fields]
    if header is None or header.problem or not set(WEBVID_COLUMNS) <= set(found):
        columns = ", ".join(found)[:MAX_DETAIL] if header is None or not header.problem else ""
        problem = (columns and f"columns {columns}") or "no header"
        raise ValueError(f"{url}:1: {problem}; expected {', '.join(WEBVID_COLUMNS)}")
    for record in records:
        origin = f"{url}:{record.number}"
        try:
            check_record(record, found, origin)
        except ValueError as error:
            yield refused_row(origin, str(error))
            continue
        row = dict(zip(found, record.fields, strict=True))
        name, page, caption = (row[column].strip() for column in WEBVID_COLUMNS)
        if not name:
            yield _refused(origin, "videoid='' must be text")
            continue
        files = [f"{page}/{name}", name] if page else [name]
        yield PublishedClip(
            name=name,
            captions=(caption,),
            files=tuple((file, WHOLE) for file in files),
            origin=origin,
        )


def _refused(where: str, problem: str) -> RefusedRow:
    return refused_row(where, f"{where}: {problem}")
