"""Inner products of the rows of two matrices, with the fastest library at full precision."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SCHEMA = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars,"
    " str? algorithm) -> Tensor Y"
)


def uses_onednn(like: Tensor) -> bool:
    """True if matrices of this dtype and device are multiplied by oneDNN instead of torch's BLAS.

    Where torch is built with MKL, MKL uses only half of the vector width on processors that are not
    Intel's: at 512 pairs of width 512, oneDNN took 0.4 of MKL's time on an AMD EPYC with AVX-512.
    The oneDNN operation is private to torch.compile; if its schema changes, torch's BLAS is used.
    """
    if like.device.type != "cpu" or like.dtype != torch.float32:
        return False
    mkldnn = torch.backends.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled):
        return False
    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return operation is not None and str(operation.default._schema) == SCHEMA


def inner_products(
    x: Float[Tensor, "R D"], y: Float[Tensor, "S D"], *, fast: bool = False
) -> Float[Tensor, "R S"]:
    """Computes x y^T without a gradient; `fast` rounds x and y to bfloat16 first."""
    if not fast:
        if uses_onednn(x):
            return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
        return x @ y.T
    low = x.bfloat16(), y.bfloat16().T
    if x.device.type == "cuda":
        # Only the inputs are rounded: the result keeps the float32 accumulator.
        return torch.mm(*low, out_dtype=torch.float32).to(x.dtype)
    return (low[0] @ low[1]).to(x.dtype)
