"""Random inputs of TPM-CL."""

import torch
from torch import Tensor

from tvr.kernels.numerics import unit
from tvr.kernels.weight_layers import TokenWeightLayer


def partial_inputs(
    pairs: int = 3, words: int = 5, frames: int = 4, width: int = 8, seed: int = 0
) -> dict:
    """Random arguments of `tpm_cl` in float64, with 1 to all valid frames."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    lengths = torch.randint(1, frames + 1, (pairs, 1), generator=draw)
    return {
        "sentence": unit(normal(pairs, width)),
        "words": unit(normal(pairs, words, width)),
        "frames": unit(normal(pairs, frames, width)),
        "frame_mask": (torch.arange(frames) < lengths).long(),
        "word_weights": normal(pairs, words).softmax(1),
        "frame_weights": normal(pairs, frames).softmax(1),
        "frame_weight_layer": None,
    }


def weight_layer(width: int = 8) -> TokenWeightLayer:
    """A `TokenWeightLayer` in float64 with the same parameters at every call."""
    torch.manual_seed(0)
    return TokenWeightLayer(width).double()
