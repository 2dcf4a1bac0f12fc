"""Token weights, selector and TPM-CL equal the authors' implementation, in float64.

Intended differences: only matched pairs enter, each with its own frame weights and its own video
(`pair.*`). The authors' code sums weights over its block and mismatches pairs in batches above 8
(`ref.*`). Intended equalities: the selection has no gradient, so the frame predictor gets none; the
partial words are not normalised; predictors give weight to padding.
"""

import re

import pytest
import torch
from builders.golden.archives import assert_all_compared, assert_equals_golden, tensor
from builders.golden.partial import (
    PREDICTORS,
    SELECTORS,
    TPM_CASES,
    predictor_results,
    selector_results,
    tpm_results,
)

BLOCK_MATRICES = ("t2vh", "t2vhh", "tg2vh", "tg2vhh", "tgh2vh")


def test_all_golden_cases_are_found() -> None:
    assert len(TPM_CASES) == 6 + 2 + 1


@pytest.mark.parametrize("case", PREDICTORS)
def test_token_weights_equal_the_golden_arrays(case: str) -> None:
    assert_equals_golden("predictors.npz", predictor_results(case))


@pytest.mark.parametrize("case", SELECTORS)
def test_selector_equals_the_golden_arrays(case: str) -> None:
    # Row 1 has equal weights: the golden sort decides which tokens it drops, so only their number
    # is compared.
    result = selector_results(case)
    for name, value in result.items():
        expected = tensor("predictors.npz", name)
        rows = [0, *range(2, len(expected))]
        torch.testing.assert_close(value[rows].double(), expected[rows], rtol=1e-9, atol=1e-12)
    expected = tensor("predictors.npz", f"{case}.policy")
    assert int(result[f"{case}.policy"][1].sum()) == int(expected[1].sum())


@pytest.mark.parametrize(("file", "case"), TPM_CASES)
def test_tpm_cl_equals_the_matched_pair_arrays(file: str, case: str) -> None:
    assert_equals_golden(file, tpm_results(file, case))


@pytest.mark.parametrize(
    ("file", "case"),
    [x for x in TPM_CASES if "blockbug" in x[0] or x[1].startswith("att_wti")],
)
def test_tpm_cl_differs_from_the_authors_where_their_blocks_mix_pairs(file: str, case: str) -> None:
    ours = tpm_results(file, case)
    loss = tensor(file, f"{case}.ref.loss")
    assert abs(ours[f"{case}.pair.loss"] - loss) > 1e-3
    gradient = tensor(file, f"{case}.ref.grad.video")
    assert (ours[f"{case}.pair.grad.video"] - gradient).abs().max() > 1e-4


def test_tpm_cl_equals_the_diagonal_of_the_authors_matrices() -> None:
    sims = tpm_results("tpmcl.npz", "ti.type4")["ti.type4.pair.sims"]
    for ours, name in zip(sims, BLOCK_MATRICES, strict=True):
        matrix = tensor("tpmcl.npz", f"ti.blockmatrix.{name}")
        torch.testing.assert_close(ours.detach(), matrix.diagonal(), rtol=1e-9, atol=1e-12)


def test_frame_predictor_gets_no_gradient_as_published() -> None:
    result = tpm_results("tpmcl.npz", "att_wti.type4")
    frame_side = [x for name, x in result.items() if re.search(r"grad\.param\.t2v_", name)]
    word_side = [x for name, x in result.items() if re.search(r"grad\.param\.v2t_", name)]
    assert all(x.count_nonzero() == 0 for x in frame_side)
    assert all(x.count_nonzero() > 0 for x in word_side)


@pytest.mark.parametrize("file", sorted({file for file, _ in TPM_CASES}))
def test_every_result_of_tpm_cl_is_compared(file: str) -> None:
    cases = [case for case in TPM_CASES if case[0] == file]
    assert_all_compared(file, [name for case in cases for name in tpm_results(*case)])


def test_every_result_of_predictors_and_selectors_is_compared() -> None:
    names = [name for case in PREDICTORS for name in predictor_results(case)]
    names += [name for case in SELECTORS for name in selector_results(case)]
    assert_all_compared("predictors.npz", names)
