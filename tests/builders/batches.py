"""Training and evaluation batches with small default settings, and damage to their data sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from builders.clip_files import tokenize

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.reading.loader import evaluation_batches, train_batches
from tvr.data_prep.records import Batch

Row = tuple[int, str, str, int]
"""(position, key, caption, sum of the frames) of one row of a batch."""


def training(url: str, **changes: Any) -> Iterator[Batch]:
    """`train_batches` with defaults for the clips of `clip_files`."""
    defaults: dict[str, Any] = {
        "seed": 7,
        "global_batch": 8,
        "micro_batch": 2,
        "rank": 0,
        "world_size": 1,
        "start_step": 0,
        "workers": 0,
        "num_frames": 4,
        "image_size": 16,
        "tokenize": tokenize,
        "max_bad": 0,
    }
    return train_batches(url, **(defaults | changes))


def evaluation(url: str, **changes: Any) -> list[Batch]:
    """All of `evaluation_batches` with defaults for the clips of `clip_files`."""
    defaults: dict[str, Any] = {
        "micro_batch": 4,
        "rank": 0,
        "world_size": 1,
        "workers": 0,
        "num_frames": 4,
        "image_size": 16,
        "tokenize": tokenize,
        "max_bad": 0,
    }
    return list(evaluation_batches(url, **(defaults | changes)))


def rows_of(batches: Sequence[Batch]) -> list[Row]:
    """The rows of batches, in order."""
    return [
        (position, key, caption, int(frames.sum()))
        for batch in batches
        for position, key, caption, frames in zip(
            batch.positions.tolist(), batch.keys, batch.captions, batch.frames, strict=True
        )
    ]


def flip_bit(path: Path, offset: int) -> None:
    """Flips the lowest bit of one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def damage_sample(folder: Path, row: int, offset: int = 600) -> None:
    """Flips a bit of a sample; `offset` counts from its first byte, negative from its end."""
    manifest = read_manifest(str(folder))
    samples = manifest.samples
    start = int(samples.offset[row]) + (int(samples.length[row]) if offset < 0 else 0)
    flip_bit(folder / manifest.file_of_shard(int(samples.shard[row])).name, start + offset)
