"""The device of this machine, and the backend that a run's similarity would use on it."""

from __future__ import annotations

import torch

from tvr.kernels.backends import cpu_build
from tvr.kernels.backends.cpu import unsupported_reason
from tvr.kernels.backends.matmul import uses_onednn
from tvr.kernels.backends.tile_compiler import compile_failure
from tvr.kernels.similarity import default_backend
from tvr.kernels.token_sets import FrameSet, TokenSet
from tvr.trainer.config import Config


def device() -> str:
    """ "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_line() -> str:
    """One line that names the device and the collectives' backend."""
    if device() == "cuda":
        return (
            f"runs on: {torch.cuda.device_count()} CUDA devices, NCCL (torch {torch.__version__})"
        )
    return f"runs on: CPU, gloo (torch {torch.__version__}; torch finds no CUDA device)"


def similarity_backend(config: Config) -> tuple[str, str]:
    """Selects the similarity's backend; the first call may compile the kernels for half a minute.

    Returns:
        ("compiled", path of the library), or ("torch" or "dense", why it is not "compiled").

    Raises:
        ValueError: `train.similarity_backend` is "compiled", which this machine cannot use.
    """
    chosen = config.train.similarity_backend
    if chosen in ("torch", "dense"):
        return chosen, "set by train.similarity_backend"
    # The check takes tensors: empty ones here, of the run's numbers of words and frames.
    empty = torch.empty(0, device=device())
    num_frames = config.data.num_frames * config.model.tokens_per_frame
    slots = [empty.new_empty(0, n) for n in (config.data.max_words, num_frames)]
    words, frames = (x[..., None] for x in slots)
    texts = TokenSet(words, slots[0], slots[0] > 0)
    reason = unsupported_reason((texts,), FrameSet(frames, slots[1], None, None))
    if reason is None:
        return cpu_build.available_backend()
    if chosen == "compiled":
        raise ValueError(f"train.similarity_backend=compiled is not available: {reason}")
    return default_backend(device(), reason), reason


def similarity_line(config: Config) -> str:
    """One line that names the similarity's backend, and why it is not the compiled one."""
    name, path_or_reason = similarity_backend(config)
    library = "oneDNN" if uses_onednn(torch.empty(0, device=device())) else "torch's own library"
    if name == "dense" and device() == "cuda":
        library = "three bfloat16 products each"
    if config.train.fast_similarity:
        library = "bfloat16, set by train.fast_similarity"
    if name == "compiled":
        return f"similarity: compiled kernels ({path_or_reason}), products by {library}"
    line = f"similarity: {name} tiles, products by {library}; {path_or_reason}"
    if name == "dense" and config.train.compile_similarity:
        failure = compile_failure(device())
        line += "; compiled tiles" if failure is None else f"; tiles not compiled: {failure}"
    return line
