"""Reads the published files of benchmarks: lists of video ids, and captions by video id."""

from __future__ import annotations

import csv
import json
from typing import Any

import fsspec

from tvr.data_prep.annotations.rows import text_lines
from tvr.data_prep.annotations.safe_pickle import load_plain_pickle, plain_text


def read_ids(url: str) -> dict[str, str]:
    """Reads a list of video ids.

    The list is a .txt file with one id a line, a .csv file with a column video_id, or a .json list
    or object with the ids as keys.

    Returns:
        The location of each id, "file:line", by id in file order.

    Raises:
        ValueError: the file is malformed, or an id is not unique.
    """
    if url.endswith(".csv"):
        rows = [(f"{url}:{number}", row["video_id"]) for number, row in _csv_rows(url, "video_id")]
    elif url.endswith(".json"):
        rows = [(f"{url}: id {n}", name) for n, name in enumerate(_read_json(url, list, dict), 1)]
    else:
        lines = enumerate(text_lines(url), start=1)
        rows = [(f"{url}:{number}", line.strip()) for number, line in lines if line.strip()]
    origins: dict[str, str] = {}
    for origin, name in rows:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{origin}: video id {name!r} must be text")
        if name in origins:
            raise ValueError(f"{origin}: video id {name!r} again, first at {origins[name]}")
        origins[name] = origin
    return origins


def msrvtt_captions(url: str) -> dict[str, list[str]]:
    """Reads MSRVTT_data.json: {"sentences": [{"caption", "video_id", ...}]}, about 20 a video."""
    sentences = _read_json(url, dict).get("sentences")
    if not isinstance(sentences, list):
        raise ValueError(f"{url}: sentences must be a list, found {type(sentences).__name__}")
    captions: dict[str, list[str]] = {}
    for number, entry in enumerate(sentences):
        where = f"{url}: sentences[{number}]"
        captions.setdefault(_text(entry, "video_id", where), []).append(
            _text(entry, "caption", where)
        )
    return captions


def jsfusion_captions(url: str) -> dict[str, list[str]]:
    """Reads MSRVTT_JSFUSION_test.csv: the one sentence a video that split 1k-A evaluates."""
    rows = _csv_rows(url, "video_id", "sentence")
    return {row["video_id"]: [row["sentence"]] for _, row in rows}


def msvd_captions(url: str) -> dict[str, list[str]]:
    """Reads raw-captions.pkl: {id: [[word, ...], ...]}, about 41 captions a video."""
    with fsspec.open(url, "rb") as file:
        value = load_plain_pickle(file.read(), url)  # type: ignore[union-attr]
    if not isinstance(value, dict):
        raise ValueError(f"{url}: expected a dict, found {type(value).__name__}")
    captions: dict[str, list[str]] = {}
    for name, sentences in value.items():
        video_id = plain_text(name, url)
        where = f"{url}: {video_id}"
        if not isinstance(sentences, list | tuple):
            raise ValueError(f"{where}: expected a list, found {type(sentences).__name__}")
        captions[video_id] = [_sentence(words, where) for words in sentences]
    return captions


def didemo_captions(url: str) -> dict[str, list[str]]:
    """Reads *_data.json: [{"video", "description", ...}]; joins a video's descriptions."""
    sentences: dict[str, list[str]] = {}
    for number, entry in enumerate(_read_json(url, list)):
        where = f"{url}: [{number}]"
        sentences.setdefault(_text(entry, "video", where), []).append(
            _text(entry, "description", where)
        )
    return {name: [_paragraph(texts)] for name, texts in sentences.items()}


def activitynet_captions(url: str) -> dict[str, list[str]]:
    """Reads train.json or val_1.json: {id: {"sentences": [...]}}; joins a video's sentences."""
    captions: dict[str, list[str]] = {}
    for name, entry in _read_json(url, dict).items():
        sentences = entry.get("sentences") if isinstance(entry, dict) else None
        if not isinstance(sentences, list) or not all(isinstance(one, str) for one in sentences):
            raise ValueError(f"{url}: {name}: sentences={sentences!r} must be a list of texts")
        captions[name] = [_paragraph(sentences)]
    return captions


def _sentence(words: Any, where: str) -> str:
    if isinstance(words, list | tuple):
        return " ".join(plain_text(word, where) for word in words)
    return plain_text(words, where)


def _paragraph(sentences: list[str]) -> str:
    """Joins sentences to one caption."""
    return " ".join(" ".join(sentences).split())


def _csv_rows(url: str, *columns: str) -> list[tuple[int, dict[str, str]]]:
    """Returns (line, row) of a CSV file with at least `columns`."""
    reader = csv.DictReader(text_lines(url), strict=True)
    rows = []
    try:
        found = reader.fieldnames or ()
        if not set(columns) <= set(found):
            raise ValueError(f"{url}:1: columns {', '.join(found)}; expected {', '.join(columns)}")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{url}:{reader.line_num}: expected {len(found)} fields")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise ValueError(f"{url}:{reader.line_num + 1}: not CSV: {error}") from error
    return rows


def _read_json(url: str, *types: type) -> Any:
    try:
        value = json.loads("".join(text_lines(url)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{url}: not JSON: {error}") from error
    if not isinstance(value, types):
        expected = " or ".join(kind.__name__ for kind in types)
        raise ValueError(f"{url}: expected a {expected}, found {type(value).__name__}")
    return value


def _text(entry: Any, name: str, where: str) -> str:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name}={value!r} must be text")
    return value
