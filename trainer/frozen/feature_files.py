"""Files of features that a user brings: one a video, npy or safetensors.

    KEY.npy            frames (F, D)
    KEY.safetensors    frames (F, D); perhaps words (A, T, W) of the A captions in their order, with
                       word_mask (A, T), 0 = padding, and sentence (A, W)

Numbers are float16, bfloat16, float32 or float64, and finite. Without `word_mask`, a word of zeros
is padding; without `sentence`, it is the mean of the words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tvr.data_prep.records import BadSample
from tvr.data_prep.storage.storage_errors import is_passing_error
from tvr.data_prep.video.frame_sampling import segment_centres

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TEXT_NAMES = ("words", "word_mask", "sentence")


@dataclass(frozen=True, slots=True)
class FileFeatures:
    """Features of one video, in float32."""

    frames: Tensor
    """(F, D), F from 1 to the number of frames of the set."""
    sentence: Tensor | None
    """(A, W); None if the file has no texts."""
    words: Tensor | None
    """(A, T, W)."""
    word_mask: Tensor | None
    """(A, T)."""


def read_file(folder: Path, key: str, *, num_frames: int) -> FileFeatures:
    """Reads and checks the file of a video; of more frames it takes the middle of equal segments.

    Raises:
        BadSample: the file is missing or unreadable, or its content is not allowed; says why.
    """
    found = _tensors(folder, key)
    for name, values in found.items():
        if name != "word_mask" and values.dtype not in FLOATS:
            raise BadSample(key, "unreadable", f"{name} is of type {values.dtype}, not floats")
        if name != "word_mask":
            # Also a float64 that float32 cannot hold.
            found[name] = values.float()
            if not bool(found[name].isfinite().all()):
                raise BadSample(
                    key, "unreadable", f"{name} holds numbers that are not finite in float32"
                )
    frames = found["frames"]
    if frames.ndim != 2 or 0 in frames.shape:
        raise BadSample(
            key, "unreadable", f"frames have shape {tuple(frames.shape)}; needed is (F, D)"
        )
    if len(frames) > num_frames:
        frames = frames[segment_centres(len(frames), num_frames)]
    return FileFeatures(frames, *_texts(found, key))


def _texts(
    found: dict[str, Tensor], key: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    words = found.get("words")
    if words is None:
        if extra := [name for name in TEXT_NAMES if name in found]:
            raise BadSample(key, "unreadable", f"{extra[0]} without words")
        return None, None, None
    if words.ndim != 3 or 0 in words.shape:
        raise BadSample(
            key, "unreadable", f"words have shape {tuple(words.shape)}; needed is (A, T, W)"
        )
    mask = found.get("word_mask")
    mask = words.ne(0).any(dim=-1) if mask is None else mask != 0
    if mask.shape != words.shape[:2] or not bool(mask.any(dim=1).all()):
        raise BadSample(
            key,
            "unreadable",
            f"word_mask {tuple(mask.shape)} must be {tuple(words.shape[:2])}, and no caption empty",
        )
    sentence = found.get("sentence")
    if sentence is None:
        weights = mask[..., None].float()
        sentence = (words * weights).sum(1) / weights.sum(1)
    if sentence.shape != (len(words), words.shape[2]):
        raise BadSample(
            key,
            "unreadable",
            f"sentence has shape {tuple(sentence.shape)}; words are {tuple(words.shape)}",
        )
    return sentence, words, mask.long()


def _tensors(folder: Path, key: str) -> dict[str, Tensor]:
    path = folder / f"{key}.safetensors"
    try:
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                names = [name for name in ("frames", *TEXT_NAMES) if name in file.keys()]
                if "frames" not in names:
                    raise BadSample(key, "unreadable", f"{path.name} holds no frames")
                return {name: file.get_tensor(name) for name in names}
        path = folder / f"{key}.npy"
        # Without pickle: a file from elsewhere must not run code.
        values = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        detail = f"{folder} holds neither {key}.npy nor {key}.safetensors"
        raise BadSample(key, "missing_file", detail) from None
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        # A file that the storage does not give for the moment may be a good one.
        is_passing = isinstance(error, OSError) and is_passing_error(error)
        reason = "unavailable" if is_passing else "unreadable"
        raise BadSample(key, reason, f"{path.name}: {error}") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f" or values.itemsize > 8:
        raise BadSample(key, "unreadable", f"{path.name} holds no floats of at most 64 bits")
    # torch takes no numbers in the byte order of other machines.
    native = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("="))
    return {"frames": torch.from_numpy(native)}
