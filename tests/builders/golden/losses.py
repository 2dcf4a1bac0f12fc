"""Computes the golden loss cases with the code under test."""

from functools import cache

import torch
from builders.golden.archives import golden, tensor
from torch import Tensor

from tvr.kernels.losses import info_nce, neg_nce, row_info_nce, row_neg_nce
from tvr.kernels.row_loss.online_softmax import SINGLE_RANK, hard_negatives

FILE = "loss.npz"
CASES = sorted(name.removesuffix(".hard") for name in golden(FILE) if name.endswith(".hard"))
LOSSES = {"crossen": (info_nce, row_info_nce), "negnce": (neg_nce, row_neg_nce)}
DIRECTIONS = {"t2v": "text_to_video", "v2t": "video_to_text"}


@cache
def results(case: str) -> dict[str, Tensor]:
    """Hard negatives, losses and gradients of one case, under the names of the golden arrays."""
    scores = tensor(FILE, f"{case}.sim")
    result = {f"{case}.hard": hard_negatives(scores, row_offset=0, collectives=SINGLE_RANK)}
    for kind, (square, rows) in LOSSES.items():
        leaf = scores.clone().requires_grad_()
        losses = {"sym": square(leaf)}
        terms = rows(leaf, row_offset=0, collectives=SINGLE_RANK)
        losses |= {short: getattr(terms, name) for short, name in DIRECTIONS.items()}
        for direction, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            result[f"{case}.{kind}.{direction}.loss"] = loss
            result[f"{case}.{kind}.{direction}.grad"] = gradient
    return result
