"""What a run would use on this machine: device, and the way its similarity is computed."""

from __future__ import annotations

import torch

from tvr.kernels.backends import cpu_build
from tvr.kernels.backends.cpu import unsupported_reason
from tvr.kernels.backends.matmul import uses_onednn
from tvr.kernels.token_sets import FrameSet, TokenSet
from tvr.trainer.config import Config


def device() -> str:
    """ "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_line() -> str:
    """Device and collectives, and why not the faster ones."""
    if device() == "cuda":
        return (
            f"runs on: {torch.cuda.device_count()} CUDA devices, NCCL (torch {torch.__version__})"
        )
    return f"runs on: CPU, gloo (torch {torch.__version__}; torch finds no CUDA device)"


def similarity_backend(config: Config) -> tuple[str, str]:
    """("compiled", where it lies) or ("torch", why); may compile for half a minute, once."""
    # The rule asks for tensors. Their sizes and kind are those of a run's, of no text and video.
    none = torch.empty(0, device=device())
    slots = [none.new_empty(0, n) for n in (config.data.max_words, config.data.num_frames)]
    words, frames = (x[..., None] for x in slots)
    texts = TokenSet(words, slots[0], slots[0] > 0)
    reason = unsupported_reason((texts,), FrameSet(frames, slots[1], None, None))
    return ("torch", reason) if reason else cpu_build.available_backend()


def similarity_line(config: Config) -> str:
    """The backend of the similarity, and why not the compiled one."""
    name, place_or_reason = similarity_backend(config)
    library = "oneDNN" if uses_onednn(torch.empty(0, device=device())) else "torch's own library"
    if config.train.fast_similarity:
        library = "bfloat16, as train.fast_similarity asks"
    if name == "compiled":
        return f"similarity: compiled kernels ({place_or_reason}), products by {library}"
    return f"similarity: torch tiles, products by {library}; {place_or_reason}"
