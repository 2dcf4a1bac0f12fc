"""Matrix products at full precision, with the fastest library for the device."""

from __future__ import annotations

from typing import TypeAlias

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


# A matrix, or its bfloat16 parts: the rounded matrix and the rounded rest.
Parts: TypeAlias = tuple[Tensor, ...]


def parts(x: Tensor, *, split: bool) -> Parts:
    """Splits a float32 matrix into bfloat16 parts whose sum has 16 significant bits.

    Without `split` the matrix is its own single part.
    """
    if not split:
        return (x,)
    high = x.bfloat16()
    # The difference is exact in float32.
    return high, (x - high).bfloat16()


def product_of_parts(x: Parts, y: Parts) -> Float[Tensor, "R S"]:
    """Computes x y without a gradient; R x K times K x S.

    With split matrices this is high x high + high x low + low x high: three bfloat16 products with
    float32 sums. It is off by 2e-5 of |x| |y| at most, for entries of one sign, and by far less for
    the rows of features, whose errors cancel.
    """
    total = _product(x[0], y[0])
    if len(x) > 1:
        total += _product(x[0], y[1])
        total += _product(x[1], y[0])
    return total


def split_inner_products(x: Parts, y: Parts) -> Float[Tensor, "R S"]:
    """Computes x y^T as `product_of_parts` does, in one product of three times the width.

    One product writes its result once; three would write it three times. That counts where the
    result is larger than the matrices.
    """
    (x_high, x_low), (y_high, y_low) = x, y
    wide = torch.cat([x_high, x_high, x_low], dim=1), torch.cat([y_high, y_low, y_high], dim=1)
    return _product(wide[0], wide[1].T)


def _product(x: Tensor, y: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16:
        if x.device.type == "cuda":
            return torch.mm(x, y, out_dtype=torch.float32)
        # Products of bfloat16 numbers are exact in float32: what a tensor core computes.
        return x.float() @ y.float()
    return inner_products(x.contiguous(), y.T.contiguous()) if uses_onednn(x) else x @ y
