"""InfoNCE and NegNCE equal the authors' implementation, value and gradient, in each direction.

Properties that these arrays pin: a probability is clamped to [1e-6, 1 - 1e-6], so a positive below
it has gradient exactly 0; a pair is hard by its row's OR its column's positive; equal scores are
not hard; the penalty is one mean over all hard pairs of the square.
"""

import pytest
from builders.golden.archives import assert_all_compared, assert_equals_golden, tensor
from builders.golden.losses import CASES, FILE, results

from tvr.kernels.losses import row_neg_nce
from tvr.kernels.row_loss.online_softmax import SINGLE_RANK


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_the_golden_arrays(case: str) -> None:
    assert_equals_golden(FILE, results(case))


def test_clamped_positives_are_counted() -> None:
    scores = tensor(FILE, "n5_saturated.sim", leaf=True)
    terms = row_neg_nce(scores, row_offset=0, collectives=SINGLE_RANK)
    positives = [(100 * scores.detach()).log_softmax(dim).diagonal().exp() for dim in (1, 0)]
    clamped = sum(int((p < 1e-6).sum()) for p in positives)
    assert clamped > 0
    assert terms.clamped_share.item() == pytest.approx(clamped / (2 * len(scores)))
    hard = tensor(FILE, "n5_saturated.hard")
    assert terms.hard_negatives_per_row.item() == pytest.approx(hard.sum().item() / len(scores))


def test_every_result_of_the_losses_is_compared() -> None:
    assert_all_compared(FILE, [name for case in CASES for name in results(case)])
