"""Inner products of the rows of two matrices, by the fastest library that keeps precision."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SCHEMA = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars,"
    " str? algorithm) -> Tensor Y"
)


def by_onednn(like: Tensor) -> bool:
    """Whether oneDNN multiplies matrices of this kind.

    torch's own choice for float32 on a CPU is the BLAS that it was built with. Where that is MKL
    and the processor not Intel's, MKL leaves half of its vectors unused: at 512 pairs of width 512
    oneDNN took 0.4 of the time on an AMD EPYC with AVX-512. (The operation is torch.compile's: a
    torch that has another one of that name is left to its own choice.)
    """
    if like.device.type != "cpu" or like.dtype != torch.float32:
        return False
    mkldnn = torch.backends.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled):
        return False
    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return operation is not None and str(operation.default._schema) == SCHEMA


def products(
    x: Float[Tensor, "R D"], y: Float[Tensor, "S D"], *, fast: bool = False
) -> Float[Tensor, "R S"]:
    """x y^T, without a gradient; `fast`: of both rounded to bfloat16."""
    if not fast:
        if by_onednn(x):
            return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
        return x @ y.T
    low = x.bfloat16(), y.bfloat16().T
    if x.device.type == "cuda":
        # Rounded on the way in only: the sums come out as they were added up.
        return torch.mm(*low, out_dtype=torch.float32).to(x.dtype)
    return (low[0] @ low[1]).to(x.dtype)
