"""What the files of a feature set hold, and what their fields may say.

    manifest.json                  the model, sizes, and every part; written last
    SET/BLOCK/part.json            the same of one part, from which an interrupted writer resumes
    SET/BLOCK/COLUMN.bin           one array, little-endian, without a header

A feature set may come from anyone. Names become paths and sizes become memory, so each field has a
pattern, a type and a range, and is checked before anything is done with it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from tvr.data_prep.dataset.index_rules import IndexFields, refuse
from tvr.data_prep.records import BAD_SAMPLE_REASONS, Replacement, ShardCorrupt
from tvr.trainer.features.stored_file import StoredFile

FORMAT, VERSION = "tvr-features", 1
MANIFEST, PART = "manifest.json", "part.json"
StoredType = Literal["fp32", "fp16", "int8"]
SourceKind = Literal["packed", "videos"]
Matching = Literal["two_way", "words_to_frames"]
STORED_TYPES: Mapping[str, str] = {"fp32": "<f4", "fp16": "<f2", "int8": "|i1"}

MAX_MANIFEST_BYTES = 1 << 28
MAX_ROWS = 1 << 32
MAX_SIDE = 1 << 16
MAX_TEXT_BYTES = 1 << 40
MAX_TEXT = 4096
EMBED_AGAIN = "embed again"
BLOCK_NAME = re.compile(r"block-[0-9]{8}")
TEXT_COLUMNS = ("keys", "files", "captions")


OUTPUT = "output"
"""Setting of feature sets that hold outputs of towers, not of a whole model."""
COMPARED = ("stored", "num_frames", "num_words", "width", "frame_width", "has_logits")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureHeader:
    """What all parts of a feature set have in common."""

    model: str
    """Readable name of the model."""
    fingerprint: str
    """`SourceModel.fingerprint` of the model that encoded them."""
    settings: Mapping[str, Any]
    """`SourceModel.settings`."""
    stored: StoredType
    """Type in which vectors are stored."""
    num_frames: int
    """Frame vectors of a video."""
    num_words: int
    width: int
    """Width of sentence and words."""
    has_logits: bool
    """True if the model weights tokens."""
    frame_width: int = 0
    """Width of frames, before any projection; 0: `width`."""

    @property
    def is_of_towers(self) -> bool:
        """True for outputs of towers, from which only training and its evaluations go on."""
        return OUTPUT in self.settings

    @property
    def matching(self) -> Matching:
        """`model.matching` of the model; features of earlier versions, without one, are two-way."""
        return self.settings.get("matching", "two_way")

    @property
    def has_frame_logits(self) -> bool:
        """True if it weights frames, too."""
        return self.has_logits and self.matching == "two_way"

    def check_same(self, other: FeatureHeader, where: str) -> None:
        """Raises ValueError, which names the difference, if features of both cannot be mixed."""
        mine, others = self.settings, other.settings
        for name in sorted({*mine, *others}):
            if mine.get(name) != others.get(name):
                raise ValueError(
                    f"{where} holds features of {name}={mine.get(name)}, not"
                    f" {others.get(name)}; give the same settings, or another folder"
                )
        if self.fingerprint != other.fingerprint:
            raise ValueError(
                f"{where} holds features of another model, {self.model}, whose weights differ from"
                f" those of {other.model}; give another folder"
            )
        for name in COMPARED:
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"{where} holds features with {name}={getattr(self, name)}, not"
                    f" {getattr(other, name)}; give another folder"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """A data set whose videos and captions were encoded."""

    url: str
    kind: SourceKind
    """packed: a data set of `tvr pack` or `tvr adopt`. videos: a folder of video files."""
    content: str
    """SHA-256 of what it held."""
    num_blocks: int
    """Parts into which its videos are divided."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        text = json.dumps([self.kind, self.content, self.num_blocks])
        return f"set-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One block of videos with their captions."""

    name: str
    videos: int
    captions: int
    files: Mapping[str, StoredFile]
    """Of each column."""
    left_out: tuple[Replacement, ...]
    """Videos that could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureManifest:
    header: FeatureHeader
    sets: tuple[tuple[DataSource, tuple[Part, ...]], ...]


def columns(
    header: FeatureHeader, videos: int, captions: int
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape of a part's columns; texts are bytes, and NAME_ends is where each ends."""
    vector = STORED_TYPES[header.stored]
    frames, words, width = header.num_frames, header.num_words, header.width
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "frames": (vector, (videos, frames, header.frame_width or width)),
        "frame_mask": ("|u1", (videos, frames)),
        "frame_times": ("<f4", (videos, frames)),
        "rows": ("<i8", (videos,)),
        "spans": ("<f8", (videos, 2)),
        "keys_ends": ("<i8", (videos,)),
        "files_ends": ("<i8", (videos,)),
        "sentence": (vector, (captions, width)),
        "words": (vector, (captions, words, width)),
        "word_mask": ("|u1", (captions, words)),
        "caption_video": ("<i8", (captions,)),
        "captions_ends": ("<i8", (captions,)),
    }
    if header.has_frame_logits:
        found["frame_logits"] = ("<f4", (videos, frames))
    if header.has_logits:
        found["word_logits"] = ("<f4", (captions, words))
    if header.stored == "int8":
        found["frames_scale"] = ("<f4", (videos, frames))
        found["sentence_scale"] = ("<f4", (captions,))
        found["words_scale"] = ("<f4", (captions, words))
    return {name: (np.dtype(kind), shape) for name, (kind, shape) in found.items()}


def column_bytes(kind: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Size of a column's file."""
    size = kind.itemsize
    for length in shape:
        size *= length
    return size


def to_json(manifest: FeatureManifest) -> str:
    """The manifest's text, the same for equal manifests."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "header": asdict(manifest.header),
        "sets": [
            {**asdict(source), "parts": [asdict(part) for part in parts]}
            for source, parts in manifest.sets
        ],
    }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def part_json(header: FeatureHeader, source: DataSource, part: Part) -> str:
    """The text of part.json: a manifest of one part."""
    return to_json(FeatureManifest(header=header, sets=((source, (part,)),)))


def read_manifest(path: Path) -> FeatureManifest:
    """Reads manifest.json or part.json, and checks every field.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is the manifest of a packed data set.
        ShardCorrupt: a field is missing or not allowed; names file, field and value.
    """
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        most = f"at most {MAX_MANIFEST_BYTES}"
        refuse(str(path), "bytes", path.stat().st_size, most, EMBED_AGAIN)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ShardCorrupt(f"{path}: damaged or edited: {error}") from error
    if isinstance(content, dict) and {"format_version", "layout"} <= content.keys():
        raise ValueError(
            f"{path.parent} is a packed data set, and holds no features: encode it with `tvr embed`"
            " into another folder"
        )
    fields = IndexFields(content, str(path), remedy=EMBED_AGAIN)
    fields.choice("format", (FORMAT,))
    fields.integer("version", VERSION, VERSION)
    header = _header(fields.child("header"))
    sets = tuple(_set(each, header) for each in fields.children("sets", least=0))
    names = [source.name for source, _ in sets]
    if len(set(names)) != len(names):
        fields.refuse("sets", names, "different data sets")
    return FeatureManifest(header=header, sets=sets)


def _header(fields: IndexFields) -> FeatureHeader:
    settings = fields["settings"]
    if not isinstance(settings, dict) or len(settings) > 100:
        fields.refuse("settings", settings, "a JSON object of plain settings")
    for name, value in settings.items():
        if len(name) > 100 or not isinstance(value, (str, int, float, bool, type(None))):
            fields.refuse("settings", settings, "a JSON object of plain settings")
    if settings.get("matching", "two_way") not in get_args(Matching):
        fields.refuse("settings", settings, f"matching one of {', '.join(get_args(Matching))}")
    # Earlier releases did not write it: frames were as wide as words.
    is_wide = "frame_width" in fields.names
    return FeatureHeader(
        model=fields.text("model", MAX_TEXT),
        fingerprint=fields.sha256("fingerprint"),
        settings=settings,
        stored=cast(StoredType, fields.choice("stored", get_args(StoredType))),
        num_frames=fields.integer("num_frames", 1, MAX_SIDE),
        num_words=fields.integer("num_words", 1, MAX_SIDE),
        width=fields.integer("width", 1, MAX_SIDE),
        has_logits=fields.boolean("has_logits"),
        frame_width=fields.integer("frame_width", 0, MAX_SIDE) if is_wide else 0,
    )


def _set(fields: IndexFields, header: FeatureHeader) -> tuple[DataSource, tuple[Part, ...]]:
    source = DataSource(
        url=fields.text("url", MAX_TEXT),
        kind=cast(SourceKind, fields.choice("kind", get_args(SourceKind))),
        content=fields.sha256("content"),
        num_blocks=fields.integer("num_blocks", 1, MAX_ROWS),
    )
    parts = tuple(_part(each, header) for each in fields.children("parts", least=0))
    if len({part.name for part in parts}) != len(parts):
        fields.refuse("parts", [part.name for part in parts], "parts of different names")
    return source, parts


def _part(fields: IndexFields, header: FeatureHeader) -> Part:
    videos = fields.integer("videos", 0, MAX_ROWS)
    captions = fields.integer("captions", 0, MAX_ROWS)
    stored = fields.child("files")
    expected = columns(header, videos, captions)
    needed = sorted({*expected, *TEXT_COLUMNS})
    if stored.names != needed:
        fields.refuse("files", stored.names, ", ".join(needed))
    files = {}
    for name in needed:
        file = stored.child(name)
        least, most = 0, MAX_TEXT_BYTES
        if name in expected:
            least = most = column_bytes(*expected[name])
        files[name] = StoredFile(
            num_bytes=file.integer("num_bytes", least, most),
            sha256=file.sha256("sha256"),
        )
    return Part(
        name=fields.matching("name", BLOCK_NAME, "block- and 8 digits"),
        videos=videos,
        captions=captions,
        files=files,
        left_out=tuple(_replacement(each) for each in fields.children("left_out", least=0)),
    )


def _replacement(fields: IndexFields) -> Replacement:
    return Replacement(
        position=fields.integer("position", 0, MAX_ROWS),
        key=fields.text("key", MAX_TEXT),
        reason=fields.choice("reason", tuple(BAD_SAMPLE_REASONS)),
        detail=fields.text("detail", MAX_TEXT),
    )
