"""Features of captions and videos on disk: written once, evaluated and searched.

The door of the package. `FeatureWriter` writes a set, `FeatureSet` reads it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from torch import Tensor

from tvr.data_prep.dataset.index_rules import check_texts
from tvr.data_prep.records import Replacement, ShardCorrupt
from tvr.trainer.features.layout import (
    EMBED_AGAIN,
    MANIFEST,
    OUTPUT,
    DataSource,
    FeatureHeader,
    FeatureManifest,
    Part,
    StoredType,
    columns,
    read_manifest,
)
from tvr.trainer.features.stored_column import Rows, StoredColumn, row_numbers
from tvr.trainer.features.writer import FeatureWriter, VideoSource, check_files
from tvr.trainer.model.model import Features

__all__ = [
    "EMBED_AGAIN",
    "MANIFEST",
    "OUTPUT",
    "DataSource",
    "FeatureHeader",
    "FeatureSet",
    "FeatureWriter",
    "Part",
    "StoredType",
    "VideoSource",
]

# Held in memory: few bytes a row, and all else depends on them.
CHECKED = ("keys", "keys_ends", "files_ends", "captions_ends", "caption_video", "rows")


@dataclass(frozen=True, slots=True)
class _OpenPart:
    source: DataSource
    part: Part
    columns: dict[str, np.ndarray | StoredColumn]


class FeatureSet:
    """Features of a data set, or of several ones of the same model, in files.

    Videos and captions are numbered through all parts. Vectors come back in fp32, or in fp16 if
    they are stored so; from int8 they are converted to fp32.
    """

    def __init__(self, folder: Path, manifest: FeatureManifest, *, verify: bool = False) -> None:
        self.folder = folder
        self.info: FeatureHeader = manifest.header
        """Model, types and sizes."""
        self.sources: tuple[DataSource, ...] = tuple(source for source, _ in manifest.sets)
        self._parts = [
            _opened(folder / source.name / part.name, manifest.header, source, part, verify)
            for source, parts in manifest.sets
            for part in parts
        ]
        self._video_ends = list(accumulate((each.part.videos for each in self._parts), initial=0))
        self._caption_ends = list(
            accumulate((each.part.captions for each in self._parts), initial=0)
        )
        self.keys: Sequence[str] = _Texts(self, "keys", self._video_ends)
        """Key of each video; unique within a data set."""
        self.captions: Sequence[str] = _Texts(self, "captions", self._caption_ends)
        firsts = zip(self._parts, self._video_ends, strict=False)
        rows = [each.columns["caption_video"][:] + first for each, first in firsts]
        self.caption_video: Tensor = torch.from_numpy(
            np.concatenate([np.empty(0, np.int64), *rows])
        )
        """(A,) row in `keys` of each caption's video, ascending."""

    @classmethod
    def open(cls, folder: Path | str, *, verify: bool = False, towers: bool = False) -> FeatureSet:
        """Opens a published set; vectors are read when they are used.

        Args:
            verify: Also reads all files and compares their hashes.
            towers: The set is to hold outputs of towers, before a model's heads.

        Raises:
            FileNotFoundError: there is no manifest: nothing is published.
            ValueError: the folder is a packed data set, or holds features of the other kind.
            ShardCorrupt: the manifest or a file is damaged, cut short or edited; names it.
        """
        return cls(Path(folder), cls.published(folder, towers=towers), verify=verify)

    @staticmethod
    def published(folder: Path | str, *, towers: bool = False) -> FeatureManifest:
        """Reads what is published, without its parts; raises as `open`."""
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no feature set: it has no {MANIFEST}, which `tvr embed` writes"
                " when all parts are there"
            )
        manifest = read_manifest(path)
        if manifest.header.is_of_towers != towers:
            kinds = ("features of a whole model, of `tvr embed`", "outputs of towers, for training")
            raise ValueError(
                f"{folder} holds {kinds[manifest.header.is_of_towers]}; needed are {kinds[towers]}"
                " (data.features)"
            )
        return manifest

    def __len__(self) -> int:
        """Number of videos."""
        return self._video_ends[-1]

    @property
    def num_captions(self) -> int:
        return self._caption_ends[-1]

    @property
    def left_out(self) -> tuple[Replacement, ...]:
        """Videos that could not be read."""
        return tuple(entry for each in self._parts for entry in each.part.left_out)

    @property
    def left_out_reasons(self) -> dict[str, int]:
        """Number of videos that could not be read, by reason."""
        return dict(Counter(entry.reason for entry in self.left_out))

    def videos_of(self, source: DataSource) -> tuple[Tensor, Tensor]:
        """The videos of a packed data set: their numbers, and their rows there, in this order."""
        found = [
            (first, np.asarray(each.columns["rows"][:]))
            for each, first in zip(self._parts, self._video_ends, strict=False)
            # By content: it may lie at another place than when it was encoded.
            if each.source.name == source.name
        ]
        numbers = [np.arange(first, first + len(rows)) for first, rows in found]
        none = np.empty(0, np.int64)
        joined = (np.concatenate([none, *x]) for x in (numbers, (rows for _, rows in found)))
        numbers_of, rows_of = (torch.from_numpy(x) for x in joined)
        return numbers_of, rows_of

    def verify(self, source: DataSource, part: Part) -> None:
        """Reads the files of a part and compares their hashes.

        Raises:
            ShardCorrupt: a file is missing or differs; names it.
        """
        check_files(self.folder / source.name / part.name, part, hashes=True)

    @property
    def parts(self) -> tuple[tuple[DataSource, Part], ...]:
        """The blocks of all data sets, in the order of the rows."""
        return tuple((each.source, each.part) for each in self._parts)

    def source(self, video: int) -> tuple[DataSource, VideoSource]:
        """The data set of a video, and its row or file there."""
        each, row = self._place(self._video_ends, video)
        start_s, end_s = each.columns["spans"][row : row + 1][0].tolist()
        found = VideoSource(
            row=int(each.columns["rows"][row : row + 1][0]),
            file=_text(self.folder, each, "files", row),
            start_s=start_s,
            end_s=end_s,
        )
        if found.file.startswith(("/", "\\")) or ".." in found.file.split("/"):
            raise ShardCorrupt(f"{self.folder}: file={found.file!r:.200} leaves its folder")
        return each.source, found

    def frame_times(self, video: int) -> list[float]:
        """Seconds of a video's frames from its start; not a number where unknown."""
        each, row = self._place(self._video_ends, video)
        return each.columns["frame_times"][row : row + 1][0].tolist()

    def texts(self, rows: Rows = slice(None)) -> Features:
        """Features of some captions, without videos, on the CPU."""
        rows = row_numbers(rows, self.num_captions)
        return self._features(FeatureSet.column, np.empty(0, np.int64), rows)

    def videos(self, rows: Rows = slice(None)) -> Features:
        """Features of some videos, without captions, on the CPU."""
        rows = row_numbers(rows, len(self))
        return self._features(FeatureSet.column, rows, np.empty(0, np.int64))

    def lazy_features(self, first: int = 0, end: int | None = None) -> tuple[Features, Tensor]:
        """Videos `first` to `end` and their captions; vectors are read when they are indexed.

        Returns:
            Columns that give tensors for a slice or a tensor of rows, as `rank_features` takes
            them; and the row of each caption's video among these.
        """
        end = len(self) if end is None else end
        texts = self.captions_of(first, end)
        features = self._features(_column, range(first, end), texts)
        return features, self.caption_video[texts.start : texts.stop] - first

    def caption_texts(self, rows: range) -> list[str]:
        """The texts of a video's captions, by one read of its part."""
        if not rows:
            return []
        each, first = self._place(self._caption_ends, rows.start)
        ends = each.columns["captions_ends"]
        edges = [] if first else [0]
        edges += ends[max(first - 1, 0) : first + len(rows)].tolist()
        text = each.columns["captions"][edges[0] : edges[-1]].tobytes()
        try:
            return [text[a - edges[0] : b - edges[0]].decode() for a, b in pairwise(edges)]
        except UnicodeDecodeError as error:
            raise ShardCorrupt(f"{self.folder}: captions of row {rows.start}: {error}") from error

    def captions_of(self, first: int, end: int) -> range:
        """Captions of the videos `first` to `end`."""
        return range(*(int(torch.searchsorted(self.caption_video, edge)) for edge in (first, end)))

    def _features(
        self, column: Callable[[FeatureSet, str, Any], Tensor], videos: Any, texts: Any
    ) -> Features:
        """The columns, read by `column(self, name, rows)`."""
        logits = self.info.has_logits
        return Features(
            sentence=column(self, "sentence", texts),
            words=column(self, "words", texts),
            word_mask=column(self, "word_mask", texts),
            frames=column(self, "frames", videos),
            frame_mask=column(self, "frame_mask", videos),
            word_logits=column(self, "word_logits", texts) if logits else None,
            frame_logits=(
                column(self, "frame_logits", videos) if self.info.has_frame_logits else None
            ),
            margin_hinge=None,
        )

    def column(self, name: str, rows: np.ndarray) -> Tensor:
        """Rows of one column as a tensor: masks as int64, vectors in fp32 or fp16."""
        kind, shape = columns(self.info, 0, 0)[name]
        is_vector = name in ("frames", "sentence", "words")
        converted = np.dtype(np.float32) if self.info.stored == "int8" and is_vector else kind
        out = np.empty((len(rows), *shape[1:]), converted)
        ends = self._video_ends if name.startswith("frame") else self._caption_ends
        parts = np.searchsorted(ends, rows, side="right") - 1
        for number in np.unique(parts):
            of_part, stored = parts == number, self._parts[number].columns
            values = stored[name][local := rows[of_part] - ends[number]]
            if converted is not kind and is_vector and kind == np.int8:
                values = values.astype(np.float32) * stored[f"{name}_scale"][local][..., None]
            out[of_part] = values
        if name.endswith("_mask"):
            most = 1 if name == "frame_mask" else 2
            if out.size and int(out.max()) > most:
                raise ShardCorrupt(f"{self.folder}: {name} holds {out.max()}; allowed: 0 to {most}")
            out = out.astype(np.int64)
        return torch.from_numpy(out)

    def _place(self, ends: list[int], row: int) -> tuple[_OpenPart, int]:
        if not 0 <= row < ends[-1]:
            raise IndexError(f"row {row}; {self.folder} has rows 0 to {ends[-1] - 1}")
        number = bisect_right(ends, row) - 1
        return self._parts[number], row - ends[number]


class _Texts(Sequence[str]):
    """Texts of all parts, decoded one at a time."""

    def __init__(self, features: FeatureSet, name: str, ends: list[int]) -> None:
        self._set, self._name, self._ends = features, name, ends

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        each, row = self._set._place(self._ends, index + len(self) if index < 0 else index)
        return _text(self._set.folder, each, self._name, row)

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))


class _Column:
    """Some rows of a column, in the way of a tensor: rows are read when they are indexed."""

    device = torch.device("cpu")

    def __init__(self, features: FeatureSet, name: str, rows: range) -> None:
        self._set, self._name, self._rows = features, name, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        local = row_numbers(rows, len(self))
        return self._set.column(self._name, local + self._rows.start)


def _column(features: FeatureSet, name: str, rows: range) -> Tensor:
    return cast(Tensor, _Column(features, name, rows))


def _opened(
    folder: Path, header: FeatureHeader, source: DataSource, part: Part, verify: bool
) -> _OpenPart:
    check_files(folder, part, hashes=verify, names=CHECKED)
    found: dict[str, Any] = {}
    shapes = columns(header, part.videos, part.captions)
    for name, stored in part.files.items():
        kind, shape = shapes.get(name, (np.dtype(np.uint8), (stored.num_bytes,)))
        column = StoredColumn(folder / f"{name}.bin", kind, shape)
        found[name] = column[:] if name in CHECKED else column
    for name in ("files", "captions"):
        ends = np.concatenate([[0], found[f"{name}_ends"]])
        if (np.diff(ends) < 0).any() or ends[-1] != part.files[name].num_bytes:
            raise ShardCorrupt(f"{folder / f'{name}_ends.bin'}: does not fit {name}.bin")
    videos = found["caption_video"]
    if len(videos) and (
        videos.min() < 0 or videos.max() >= part.videos or (np.diff(videos) < 0).any()
    ):
        raise ShardCorrupt(
            f"{folder / 'caption_video.bin'}: rows must ascend within 0 to {part.videos - 1}"
        )
    check_texts("key", found["keys"].tobytes(), found["keys_ends"], 0, str(folder), EMBED_AGAIN)
    return _OpenPart(source, part, found)


def _text(folder: Path, each: _OpenPart, name: str, row: int) -> str:
    ends = each.columns[f"{name}_ends"][max(row - 1, 0) : row + 1].tolist()
    start = ends[0] if row else 0
    try:
        return each.columns[name][start : ends[-1]].tobytes().decode()
    except UnicodeDecodeError as error:
        raise ShardCorrupt(f"{folder}: {name} of row {row}: {error}") from error
