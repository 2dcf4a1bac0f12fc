"""Reads samples of other tools' shards as this package's own: captions, video_id and video.

The archives stay as they are. `manifest.json` says by which rules their files are read, and a
sample is translated when it is read:

- The video is the file with an extension of VIDEO_EXTENSIONS. Other files (audio, pictures,
  features) have no effect.
- The captions come from the sources that `ForeignRules.captions` names, in that order, each text
  once. "txt" is the whole .txt file, as one caption; any other name is a field of the .json file,
  a text, a list of texts or null.
- The video_id is the field "video_id" of the JSON, else its "url", else the name of the sample. A
  field that is no valid video_id counts as absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fsspec import available_protocols

from tvr.data_prep.caption_text import clean_captions
from tvr.data_prep.dataset.foreign_tar import ForeignSample, sample_files
from tvr.data_prep.dataset.index_rules import MAX_TEXT, IndexFields
from tvr.data_prep.records import REFUSED_TEXT, BadSample, is_video_id
from tvr.data_prep.storage.storage import Storage

CAPTION_SOURCES = ("txt", "caption", "captions")
MAX_CAPTION_SOURCES = 20
MAX_TARS = 4096
# The first one that a sample has is its video.
VIDEO_EXTENSIONS = (
    *("mp4", "webm", "mkv", "mov", "avi", "m4v", "mpg", "mpeg", "ts", "mts", "wmv", "flv"),
    *("3gp", "3g2", "ogv"),
)
VIDEO_ID_FIELDS = ("video_id", "url")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignRules:
    """How samples of other tools' shards are read; a part of `manifest.json`."""

    captions: tuple[str, ...] = CAPTION_SOURCES
    """Where captions come from: "txt", or names of fields of the JSON."""
    tars: str = ""
    """Folder of the archives, an absolute path or fsspec URL; empty = that of the index."""

    def __post_init__(self) -> None:
        names = self.captions
        if not 1 <= len(names) <= MAX_CAPTION_SOURCES or len(set(names)) < len(names):
            raise ValueError(
                f"captions={names} must be 1 to {MAX_CAPTION_SOURCES} different names: txt, or"
                " fields of the JSON files"
            )
        for name in names:
            if not 1 <= len(name) <= MAX_TEXT or REFUSED_TEXT.search(name):
                raise ValueError(
                    f"captions={name!r} must be 1 to {MAX_TEXT} characters, none for control"
                )
        if len(self.tars) > MAX_TARS or REFUSED_TEXT.search(self.tars):
            raise ValueError(
                f"tars={self.tars!r:.200} must be at most {MAX_TARS} characters, none for control"
            )


def parse_rules(index: IndexFields, url: str) -> ForeignRules:
    """Reads the rules from the index at a URL. Raises ShardCorrupt for a value that is not allowed.

    An index from elsewhere may not name files of this machine.
    """
    names, tars = index["captions"], index["tars"]
    if not isinstance(tars, str):
        index.refuse("tars", tars, "a text")
    protocol = tars.partition("://")[0] if "://" in tars else "file"
    if protocol not in available_protocols():
        index.refuse("tars", tars, "a path, or a URL of a known kind")
    if tars and not Storage(url).is_local and ("::" in tars or protocol in ("file", "local")):
        index.refuse("tars", tars, "a URL, because the index is not on this machine")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        index.refuse("captions", names, "a list of texts")
    try:
        return ForeignRules(captions=tuple(names), tars=tars)
    except ValueError as error:
        index.refuse("captions, tars", (names, tars), str(error))


def translate_range(content: bytes, key: str, rules: ForeignRules) -> dict[str, bytes]:
    """Returns the byte range of one sample as the members of a packed one: `json` and `mp4`.

    Raises:
        BadSample: the range holds anything else than one sample of plain files, or the sample has
            no video or no caption.
    """

    def read(at: int, length: int) -> bytes:
        return content[at : at + length]

    found = list(sample_files(read, len(content)))
    if len(found) != 1:
        names = [sample.name or sample.problem for sample in found][:5]
        raise BadSample(key, "missing_member", f"the range holds {names}, must hold one sample")
    return translate(found[0], read(found[0].start, len(content)), key, rules)


def translate(
    sample: ForeignSample, content: bytes, key: str, rules: ForeignRules
) -> dict[str, bytes]:
    """Returns a sample as the members of a packed one: `json` and `mp4`.

    Args:
        content: The archive from `sample.start` on.

    Raises:
        BadSample: see `translate_range`.
    """
    if sample.problem:
        raise BadSample(key, "unreadable", sample.problem)

    def member(extension: str) -> bytes | None:
        if extension not in sample.members:
            return None
        at, size = sample.members[extension]
        return content[at - sample.start : at - sample.start + size]

    fields = _fields(key, member("json"))
    video = _video_extension(sample)
    if video is None:
        status = f"; json has status={fields['status']!r:.200}" if "status" in fields else ""
        held = ", ".join(sorted(sample.members))[:200]
        raise BadSample(key, "missing_member", f"no video among {held}{status}")
    texts = list(_texts(key, rules, fields, member("txt")))
    captions = clean_captions(dict.fromkeys(texts))
    if not captions:
        raise BadSample(key, "no_caption", f"no text in {', '.join(rules.captions)}")
    meta = {
        "captions": list(dict.fromkeys(captions)),
        "words": None,
        "video_id": _video_id(key, fields),
        "frame_times_s": [],
    }
    return {"json": json.dumps(meta, ensure_ascii=False).encode(), "mp4": member(video) or b""}


def _fields(key: str, content: bytes | None) -> dict[str, Any]:
    if content is None:
        return {}
    try:
        fields = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadSample(key, "unreadable", f"json: {error!r}") from error
    if not isinstance(fields, dict):
        raise BadSample(key, "unreadable", f"json: {type(fields).__name__}, must be an object")
    return fields


def _video_extension(sample: ForeignSample) -> str | None:
    """Returns the extension of the video; of `a.video.mp4` its last part may tell."""
    for extension in VIDEO_EXTENSIONS:
        if extension in sample.members:
            return extension
    last = [name for name in sample.members if name.rpartition(".")[2] in VIDEO_EXTENSIONS]
    return last[0] if len(last) == 1 else None


def _texts(
    key: str, rules: ForeignRules, fields: dict[str, Any], txt: bytes | None
) -> Iterator[str]:
    for name in rules.captions:
        if name == "txt":
            try:
                values: Any = [] if txt is None else [txt.decode("utf-8-sig")]
            except UnicodeDecodeError as error:
                raise BadSample(key, "unreadable", f"txt: not UTF-8: {error}") from error
        else:
            value = fields.get(name)
            values = value if isinstance(value, list) else [value]
        for text in values:
            if text is None:
                continue
            if not isinstance(text, str):
                raise BadSample(key, "unreadable", f"json: {name}={text!r:.200} must be text")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise BadSample(key, "unreadable", f"json: {name}: {error}") from error
            yield text


def _video_id(key: str, fields: dict[str, Any]) -> str:
    for name in VIDEO_ID_FIELDS:
        value = fields.get(name)
        if type(value) is int:
            value = str(value)
        if isinstance(value, str) and is_video_id(value):
            return value
    return key
