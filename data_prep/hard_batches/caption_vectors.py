"""A vector for each caption of a training set: files that processes map, and that name their hash.

The folder holds four arrays and, written last, `vectors.json` with the sha256 of each. So a folder
with that file is complete. The vectors are int8 of one length per file; their dot product is the
similarity of two captions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tvr.data_prep.hard_batches.grouping import MAX_WIDTH, Captions
from tvr.launchers.atomic_write import write_atomically

FORMAT_VERSION = 1
INDEX_NAME = "vectors.json"
PIECE_BYTES = 1 << 24


class CaptionRows(NamedTuple):
    """Consecutive samples with all their captions."""

    vectors: np.ndarray
    """(C, D) int8, the captions of the first sample, then those of the second, and so on."""
    texts: np.ndarray
    """(C,) uint64, `hash_caption` of each; 0 if it could not be read."""
    videos: np.ndarray
    """(N,) uint64, `hash_video_id` of each sample."""
    num_captions: np.ndarray
    """(N,) int64, at least 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorsIndex:
    """What `vectors.json` says."""

    format_version: int
    content: str
    """`Manifest.content` of the data set."""
    source: str
    """What the vectors were made from."""
    sha256: dict[str, str]
    """Of each array's file, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CaptionVectors:
    """The vectors of a data set's captions, mapped from files."""

    index: VectorsIndex
    vectors: np.ndarray
    """(C, D) int8."""
    texts: np.ndarray
    """(C,) uint64."""
    videos: np.ndarray
    """(N,) uint64."""
    starts: np.ndarray
    """(N + 1,) int64: number of the first caption of each sample, then that of all captions."""

    @property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return len(self.videos)

    def num_captions(self, samples: np.ndarray) -> np.ndarray:
        """Returns the number of captions of samples."""
        return self.starts[samples + 1] - self.starts[samples]

    def of(self, samples: np.ndarray, choices: np.ndarray) -> Captions:
        """Returns one caption of each sample.

        Args:
            samples: (M,) rows of the data set.
            choices: (M,) number of the caption among those of its sample.
        """
        rows = self.starts[samples] + choices
        columns = (self.vectors[rows], self.texts[rows], self.videos[samples])
        return Captions(*map(np.asarray, columns))


def write_vectors(
    folder: Path,
    parts: Iterable[CaptionRows],
    *,
    width: int,
    content: str,
    source: str,
    beside: Sequence[str] = (),
) -> None:
    """Writes the vectors of a data set; files that were there are replaced, not changed.

    Args:
        folder: Where to write.
        parts: The samples in the order of the data set, some thousands at a time.
        width: Length of a vector.
        content: `Manifest.content` of the data set.
        source: What the vectors were made from.
        beside: Names of other files in the folder, which belong to the vectors.

    Raises:
        ValueError: the vectors are too long for exact sums.
        OSError: the folder cannot be written.
    """
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width={width} of caption vectors must be from 1 to {MAX_WIDTH}")
    folder.mkdir(parents=True, exist_ok=True)
    names = ("vectors.raw", "texts.npy", "videos.npy", "starts.npy")
    for name in (INDEX_NAME, *names):  # a process may still map the files
        (folder / name).unlink(missing_ok=True)
    small: dict[str, list[np.ndarray]] = {"texts": [], "videos": [], "starts": []}
    with (folder / "vectors.raw").open("wb") as file:
        for part in parts:
            assert part.vectors.shape == (part.num_captions.sum(), width)
            file.write(np.ascontiguousarray(part.vectors, np.int8).tobytes())
            small["texts"].append(part.texts.astype(np.uint64))
            small["videos"].append(part.videos.astype(np.uint64))
            small["starts"].append(part.num_captions.astype(np.int64))
        _flush(file.fileno())
    columns = {name: np.concatenate(pieces) for name, pieces in small.items()}
    columns["starts"] = np.concatenate([np.zeros(1, np.int64), np.cumsum(columns["starts"])])
    for name, column in columns.items():
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, column)
            _flush(file.fileno())
    index = VectorsIndex(
        format_version=FORMAT_VERSION,
        content=content,
        source=source,
        sha256={name: _sha256(folder / name) for name in (*names, *beside)},
    )
    write_atomically(folder / INDEX_NAME, json.dumps(asdict(index), indent=1) + "\n")


def has_vectors(folder: Path) -> bool:
    """True if the folder holds complete vectors."""
    return (folder / INDEX_NAME).exists()


def open_vectors(folder: Path, content: str, *, verify: bool = True) -> CaptionVectors:
    """Maps the vectors of a folder, and checks them.

    Args:
        folder: Where `write_vectors` wrote them.
        content: `Manifest.content` of the data set.
        verify: Also reads all files and compares their hashes; otherwise only sizes are compared.

    Raises:
        ValueError: they are damaged, of another version, or of another data set.
        OSError: a file is missing or cannot be read.
    """
    where = folder / INDEX_NAME
    try:
        index = VectorsIndex(**json.loads(where.read_text(encoding="utf-8")))
        if index.format_version != FORMAT_VERSION:
            raise ValueError(f"format_version={index.format_version}, expected {FORMAT_VERSION}")
        if index.content != content:
            raise ValueError("its data set has other samples")
        for name, sha256 in index.sha256.items() if verify else ():
            if _sha256(folder / name) != sha256:
                raise ValueError(f"the sha256 of {name} differs")
        texts, videos, starts = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("texts", "videos", "starts")
        )
        vectors = np.memmap(folder / "vectors.raw", np.int8, "r").reshape(len(texts), -1)
        if len(starts) != len(videos) + 1 or starts[-1] != len(texts):
            raise ValueError(
                f"{len(starts)} starts of {len(videos)} samples and {len(texts)} captions"
            )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{where}: the caption vectors for data.hard_batches cannot be used: {error}."
            " Restore the files; those from words are made again if their folder is removed"
        ) from error
    return CaptionVectors(index=index, vectors=vectors, texts=texts, videos=videos, starts=starts)


def _flush(descriptor: int) -> None:
    os.fsync(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
