"""Caption vectors from the text tower: every rank encodes its share of the captions.

A vector is the sentence's, less the mean of the first captions, scaled to one length and rounded to
int8. Without the mean, all captions of an untrained tower are similar.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from tvr.data_prep.hard_batches.caption_vectors import CaptionRows, CaptionVectors, write_vectors
from tvr.data_prep.hard_batches.caption_words import read_texts
from tvr.data_prep.records import Caption
from tvr.trainer.config import Config
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.engine import Engine
from tvr.trainer.model.model import image_size
from tvr.trainer.model.tokenizer import Tokenizer

EncodeCaptions = Callable[[Sequence[str]], np.ndarray]
"""(captions, D) float32 sentence vectors. With partitioned weights it is a collective, so all ranks
call it equally often."""
# Captions of one call of the tower.
BATCH = 256
# Batches of which the mean is taken; each rank encodes them itself.
MEAN_BATCHES = 8
# 127 is six standard deviations of a value.
VALUE = 20.0
ROWS = 4096


def caption_encoder(
    engine: Engine, config: Config, tokenizer: Tokenizer, world: World
) -> EncodeCaptions:
    """Returns the text tower of an engine that is in evaluation mode.

    The model's forward takes videos, too: it gets one black clip.
    """
    size, plain = image_size(config.model), replace(tokenizer, content_words=False)
    frames = torch.zeros(1, config.data.num_frames, 3, size, size, dtype=torch.uint8)
    clip = frames.to(world.device), torch.ones(frames.shape[:2], dtype=torch.int64).to(world.device)

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> np.ndarray:
        captions = (each.to(world.device) for each in plain([Caption(text=t) for t in texts]))
        return engine.encode(*clip, *captions).sentence.float().cpu().numpy()

    return encode


def write_sentence_vectors(
    folder: Path,
    captions: Path,
    words: CaptionVectors,
    encode: EncodeCaptions,
    world: World,
    *,
    source: str,
) -> None:
    """Encodes all captions of a training set, and writes their vectors. All ranks call it.

    Args:
        folder: Where to write.
        captions: Folder of the vectors from words, which has the texts.
        words: These vectors, which have the samples.
        encode: The text tower, in evaluation mode.
        world: The ranks.
        source: What `vectors.json` says of the vectors.

    Raises:
        ValueError: the vectors are too long.
        OSError: the folder cannot be written.
    """
    count, ranks = len(words.texts), world.world_size
    parts = folder.with_name(f"parts-of-{folder.name}")
    world.run_on_first(lambda: _new_folder(parts))
    mean = _mean(captions, count, encode)
    bounds = [count * rank // ranks for rank in range(ranks + 1)]
    num_batches = -(-max(end - first for first, end in pairwise(bounds)) // BATCH)
    first, end = bounds[world.rank : world.rank + 2]
    with (parts / f"{world.rank}.raw").open("wb") as file:
        batches = _batches(captions, first, end)
        for _ in range(num_batches):
            texts = next(batches, [])
            vectors = encode(texts or [""])[: len(texts)]
            file.write(_quantised(vectors - mean).tobytes())
    world.barrier()
    width = len(mean)

    def join() -> None:
        write_vectors(
            folder,
            _rows(words, [parts / f"{rank}.raw" for rank in range(ranks)], width),
            width=width,
            content=words.index.content,
            source=source,
        )
        shutil.rmtree(parts)

    world.run_on_first(join, patient=True)


def _new_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _batches(captions: Path, first: int, end: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in read_texts(captions, first, end):
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _mean(captions: Path, count: int, encode: EncodeCaptions) -> np.ndarray:
    """(D,), the same on every rank."""
    taken = [encode(texts) for texts in _batches(captions, 0, min(count, MEAN_BATCHES * BATCH))]
    return np.concatenate(taken).mean(axis=0, dtype=np.float64).astype(np.float32)


def _quantised(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled = vectors * (VALUE * math.sqrt(vectors.shape[1]) / np.maximum(lengths, 1e-9))
    return np.clip(np.rint(scaled), -127, 127).astype(np.int8)


def _rows(words: CaptionVectors, files: Sequence[Path], width: int) -> Iterator[CaptionRows]:
    """The captions of all ranks, with the samples that they belong to."""
    stored = [
        np.memmap(path, np.int8, "r").reshape(-1, width) for path in files if path.stat().st_size
    ]
    ends = np.cumsum([len(part) for part in stored]).tolist()
    for first in range(0, words.num_samples, ROWS):
        last = min(first + ROWS, words.num_samples)
        start, stop = int(words.starts[first]), int(words.starts[last])
        parts = [
            part[max(0, start - (end - len(part))) : max(0, stop - (end - len(part)))]
            for part, end in zip(stored, ends, strict=True)
        ]
        vectors, texts = np.concatenate(parts), np.asarray(words.texts[start:stop])
        vectors[texts == 0] = 0  # a bad sample has no neighbours
        yield CaptionRows(
            vectors,
            texts,
            np.asarray(words.videos[first:last]),
            np.diff(words.starts[first : last + 1]),
        )
