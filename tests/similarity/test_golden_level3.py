"""From raw features to loss: normalisation, similarity, both losses and TPM-CL in one graph.

With learned frame weights (att_wti) the authors' margin sums them over its block, an intended
difference. Only the similarity part is compared there; `pair.*` of tpmcl.npz holds that margin.
"""

import pytest
from builders.golden.archives import assert_all_compared, assert_equals_golden
from builders.golden.level3 import FILE, INTERACTIONS, results


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_features_to_loss_equal_the_golden_arrays(interaction: str) -> None:
    assert_equals_golden(FILE, results(interaction))


def test_every_result_of_the_whole_stage_is_compared() -> None:
    names = [name for interaction in INTERACTIONS for name in results(interaction)]
    assert_all_compared(FILE, names)
