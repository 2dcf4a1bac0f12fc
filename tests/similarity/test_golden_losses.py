"""InfoNCE and NegNCE equal the reference implementation's, value and gradient, each direction.

Verdicts (match): a probability is clamped to [1e-6, 1 - 1e-6], so a positive below it has gradient
exactly 0; a pair is hard by its row's OR its column's positive; equal scores are not hard; the
penalty is a mean over all hard pairs at once, here of the whole square.
"""

from functools import cache

import pytest
import torch
from builders.golden_files import assert_equals_golden, golden, tensor
from torch import Tensor

from tvr.kernels.losses import SINGLE_RANK, info_nce, neg_nce, row_info_nce, row_neg_nce
from tvr.kernels.row_loss.online_softmax import hard_negatives

FILE = "loss.npz"
CASES = sorted(name.removesuffix(".hard") for name in golden(FILE) if name.endswith(".hard"))
LOSSES = {"crossen": (info_nce, row_info_nce), "negnce": (neg_nce, row_neg_nce)}
DIRECTIONS = {"t2v": "text_to_video", "v2t": "video_to_text"}


@cache
def results(case: str) -> dict[str, Tensor]:
    scores = tensor(FILE, f"{case}.sim")
    found = {f"{case}.hard": hard_negatives(scores, row_offset=0, collectives=SINGLE_RANK)}
    for kind, (square, rows) in LOSSES.items():
        leaf = scores.clone().requires_grad_()
        losses = {"sym": square(leaf)}
        terms = rows(leaf, row_offset=0, collectives=SINGLE_RANK)
        losses |= {short: getattr(terms, name) for short, name in DIRECTIONS.items()}
        for direction, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            found[f"{case}.{kind}.{direction}.loss"] = loss
            found[f"{case}.{kind}.{direction}.grad"] = gradient
    return found


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_the_golden_arrays(case: str) -> None:
    assert_equals_golden(FILE, results(case))


def test_saturated_positive_has_no_gradient_and_is_counted() -> None:
    scores = tensor(FILE, "n5_saturated.sim", leaf=True)
    terms = row_neg_nce(scores, row_offset=0, collectives=SINGLE_RANK)
    positives = [(100 * scores.detach()).log_softmax(dim).diagonal().exp() for dim in (1, 0)]
    silent = sum(int((p < 1e-6).sum()) for p in positives)
    assert silent > 0
    assert terms.clamped_share.item() == pytest.approx(silent / (2 * len(scores)))
    hard = tensor(FILE, "n5_saturated.hard")
    assert terms.hard_negatives_per_row.item() == pytest.approx(hard.sum().item() / len(scores))
