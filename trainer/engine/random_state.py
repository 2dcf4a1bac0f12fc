"""Random states of a process: Python, numpy, torch, and its GPU."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch


def random_state_file(rank: int) -> str:
    """Returns the name of a rank's random states within a checkpoint."""
    return f"random-rank-{rank:05d}.pt"


def get_random_state() -> dict[str, Any]:
    """Returns all random states as plain containers and tensors, for `torch.load(weights_only)`."""
    legacy = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    kind, words, position, has_gauss, gauss = legacy
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(words.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `get_random_state` returned; a GPU's state is skipped where there is no GPU."""
    random.setstate(state["python"])
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
