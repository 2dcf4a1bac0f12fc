"""Reads the published files of benchmarks: lists of video ids, and captions by video id.

An entry that is wrong is noted as a refused row, and the others are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tvr.data_prep.annotations.rows import check_record, refused_row
from tvr.data_prep.annotations.safe_pickle import load_plain_pickle, plain_text
from tvr.data_prep.annotations.text_files import csv_records, line_problem, text_lines
from tvr.data_prep.file_formats.text_encoding import open_text
from tvr.data_prep.records import VIDEO_ID_RULE, RefusedRow, is_video_id
from tvr.data_prep.storage.storage import open_file


@dataclass(slots=True)
class Refusals:
    """The rows of a benchmark's files that are refused."""

    rows: list[RefusedRow] = field(default_factory=list)
    by_video: dict[str, list[RefusedRow]] = field(default_factory=dict)
    """Rows with the captions of a video, which may be of another split."""

    def note(self, origin: str, detail: str, video_id: object = None) -> None:
        """Notes a row, and its video if that is known."""
        row = refused_row(origin, detail)
        if isinstance(video_id, str):
            self.by_video.setdefault(video_id, []).append(row)
        else:
            self.rows.append(row)

    def of(self, video_ids: Iterable[str]) -> tuple[RefusedRow, ...]:
        """Returns the rows of some videos, and those of no known video."""
        return (*self.rows, *(row for name in video_ids for row in self.by_video.get(name, ())))


def read_ids(url: str, refusals: Refusals) -> dict[str, str]:
    """Reads a list of video ids.

    The list is a .txt file with one id a line, a .csv file with a column video_id, or a .json list
    or object with the ids as keys.

    Returns:
        The location of each id, "file:line", by id in file order.

    Raises:
        ValueError: the file is malformed as a whole.
    """
    rows: Iterable[tuple[str, object]]
    if url.endswith(".csv"):
        rows = ((origin, row["video_id"]) for origin, row in _csv_rows(url, refusals, "video_id"))
    elif url.endswith(".json"):
        rows = [(f"{url}: id {n}", name) for n, name in enumerate(read_json(url, list, dict), 1)]
    else:
        rows = _text_rows(url, refusals)
    origins: dict[str, str] = {}
    for origin, name in rows:
        if not isinstance(name, str) or not is_video_id(name):
            refusals.note(origin, f"{origin}: video id {name!r:.200} must be text, {VIDEO_ID_RULE}")
        elif name in origins:
            again = f"video id {name!r:.200} again, first at {origins[name]}"
            refusals.note(origin, f"{origin}: {again}")
        else:
            origins[name] = origin
    return origins


def msrvtt_captions(url: str, refusals: Refusals) -> dict[str, list[str]]:
    """Reads MSRVTT_data.json: {"sentences": [{"caption", "video_id", ...}]}, about 20 a video."""
    sentences = read_json(url, dict).get("sentences")
    if not isinstance(sentences, list):
        raise ValueError(f"{url}: sentences must be a list, found {type(sentences).__name__}")
    return _entries(sentences, f"{url}: sentences", "video_id", "caption", refusals)


def jsfusion_captions(url: str, refusals: Refusals) -> dict[str, list[str]]:
    """Reads MSRVTT_JSFUSION_test.csv: the one sentence a video that split 1k-A evaluates."""
    # The same file is the list of ids, which has noted the rows that are no CSV.
    rows = _csv_rows(url, Refusals(), "video_id", "sentence")
    return {row["video_id"]: [row["sentence"]] for _, row in rows}


def msvd_captions(url: str, refusals: Refusals) -> dict[str, list[str]]:
    """Reads raw-captions.pkl: {id: [[word, ...], ...]}, about 41 captions a video."""
    with open_file(url) as file:
        value = load_plain_pickle(file.read(), url)
    if not isinstance(value, dict):
        raise ValueError(f"{url}: expected a dict, found {type(value).__name__}")
    captions: dict[str, list[str]] = {}
    for name, sentences in value.items():
        video_id = _noted(refusals, url, None, lambda name=name: plain_text(name, url))
        if video_id is None:
            continue
        where = f"{url}: {video_id}"
        if not isinstance(sentences, list | tuple):
            found = type(sentences).__name__
            refusals.note(where, f"{where}: expected a list, found {found}", video_id)
            continue
        captions[video_id] = []
        for number, words in enumerate(sentences):
            place = f"{where}[{number}]"
            text = _noted(refusals, place, video_id, lambda w=words, p=place: _sentence(w, p))
            if text is not None:
                captions[video_id].append(text)
    return captions


def didemo_captions(url: str, refusals: Refusals) -> dict[str, list[str]]:
    """Reads *_data.json: [{"video", "description", ...}]; joins a video's descriptions."""
    entries = read_json(url, list)
    sentences = _entries(entries, f"{url}: ", "video", "description", refusals)
    return {name: [_paragraph(texts)] for name, texts in sentences.items()}


def activitynet_captions(url: str, refusals: Refusals) -> dict[str, list[str]]:
    """Reads train.json or val_1.json: {id: {"sentences": [...]}}; joins a video's sentences."""
    captions: dict[str, list[str]] = {}
    for name, entry in read_json(url, dict).items():
        sentences = entry.get("sentences") if isinstance(entry, dict) else None
        where = f"{url}: {name}"
        if isinstance(sentences, list) and all(_is_text(one) for one in sentences):
            captions[name] = [_paragraph(sentences)]
        else:
            found = f"sentences={sentences!r:.200} must be a list of texts"
            refusals.note(where, f"{where}: {found}", name)
    return captions


def _entries(
    entries: list[Any], where: str, id_name: str, text_name: str, refusals: Refusals
) -> dict[str, list[str]]:
    """Returns the texts of a list of objects by their ids."""
    texts: dict[str, list[str]] = {}
    for number, entry in enumerate(entries):
        origin = f"{where}[{number}]"
        fields = entry if isinstance(entry, dict) else {}
        wrong = [name for name in (id_name, text_name) if not _is_text(fields.get(name))]
        if wrong:
            found = f"{wrong[0]}={fields.get(wrong[0])!r:.200} must be text"
            refusals.note(origin, f"{origin}: {found}", fields.get(id_name))
        else:
            texts.setdefault(fields[id_name], []).append(fields[text_name])
    return texts


def _is_text(value: object) -> bool:
    """True for a text that a file can store: one without halves of UTF-16 pairs."""
    return isinstance(value, str) and (value.isascii() or not line_problem(value))


def _noted(
    refusals: Refusals, origin: str, video_id: str | None, read: Callable[[], str]
) -> str | None:
    """Returns what `read` returns; None if it raises ValueError, which is noted."""
    try:
        return read()
    except ValueError as error:
        refusals.note(origin, str(error), video_id)
        return None


def _sentence(words: Any, where: str) -> str:
    if isinstance(words, list | tuple):
        return " ".join(plain_text(word, where) for word in words)
    return plain_text(words, where)


def _paragraph(sentences: list[str]) -> str:
    """Joins sentences to one caption."""
    return " ".join(" ".join(sentences).split())


def _text_rows(url: str, refusals: Refusals) -> Iterable[tuple[str, str]]:
    for number, line in enumerate(text_lines(url), start=1):
        origin = f"{url}:{number}"
        if problem := line_problem(line):
            refusals.note(origin, f"{origin}: {problem}")
        elif name := line.strip():
            yield origin, name


def _csv_rows(url: str, refusals: Refusals, *columns: str) -> Iterable[tuple[str, dict[str, str]]]:
    """Yields (origin, row) of a CSV file with at least `columns`."""
    records = csv_records(url)
    header = next(records, None)
    found = header.fields if header is not None else []
    if header is not None and header.problem:
        raise ValueError(f"{url}:{header.number}: {header.problem}")
    if not set(columns) <= set(found):
        raise ValueError(f"{url}:1: columns {', '.join(found)}; expected {', '.join(columns)}")
    for record in records:
        origin = f"{url}:{record.number}"
        try:
            check_record(record, found, origin)
        except ValueError as error:
            refusals.note(origin, str(error))
        else:
            yield origin, dict(zip(found, record.fields, strict=True))


def read_json(url: str, *types: type) -> Any:
    """Reads a JSON file as a whole.

    Raises:
        ValueError: it is not JSON, or no value of these types.
    """
    try:
        # Published files are one line of any length, which `text_lines` would cut off.
        with open_text(url) as file:
            value = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{url}: not JSON: {error}") from error
    if not isinstance(value, types):
        expected = " or ".join(kind.__name__ for kind in types)
        raise ValueError(f"{url}: expected a {expected}, found {type(value).__name__}")
    return value
