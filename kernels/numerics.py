"""Unit vectors, masked softmax and precision: the numerical rules that all fast paths share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

MIN_NORM = 1e-12


def unit(x: Float[Tensor, "*rest D"]) -> Float[Tensor, "*rest D"]:
    """Normalises vectors to unit length, in float32 or float64.

    A vector of norm 1e-12 or less becomes the zero vector, with gradient 0. A division by the
    clamped norm would give it a 1e12-fold gradient instead.

    Returns:
        x / |x| along the last dimension; half precisions are raised to float32.
    """
    x = at_least_float32(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > MIN_NORM, x / norm.clamp_min(MIN_NORM), torch.zeros_like(x))


def masked_softmax(logits: Float[Tensor, "n L"], mask: Int[Tensor, "n L"]) -> Float[Tensor, "n L"]:
    """Softmax over the slots whose mask is not 0; masked slots get weight 0."""
    return logits.masked_fill(mask == 0, -torch.inf).softmax(dim=-1)


def at_least_float32(x: Tensor) -> Tensor:
    """Converts half precisions to float32; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Disables autocast: a bfloat16 score near 0.3 is off by 0.002, a logit at scale 100 by 0.2."""
    with torch.autocast(device.type, enabled=False):
        yield
