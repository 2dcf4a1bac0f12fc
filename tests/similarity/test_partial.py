"""TPM-CL beyond the golden arrays: the selector's rule, options, kinds, masks and errors."""

import pytest
import torch
from builders.partial_inputs import partial_inputs, weight_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tvr.kernels.partial import (
    AttentionTokenWeights,
    LinearTokenWeights,
    TpmCl,
    select_tokens,
    tpm_cl,
)

EMPTY_VIDEO = torch.tensor([[1] * 4, [0] * 4, [1] * 4])
EXAMPLES = settings(max_examples=15, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("weights", "threshold", "kept"),
    [
        ([0.1, 0.5, 0.4], 0.6, [True, False, True]),  # 0.5 is below 0.6, 0.5 + 0.4 is not
        ([0.1, 0.7, 0.2], 0.6, [True, True, True]),  # the first reaches 0.6: nothing is dropped
        (
            [0.25, 0.25, 0.25, 0.25],
            0.6,
            [False, False, True, True],
        ),  # ties: lower index
        (
            [0.5, 0.25, 0.25],
            0.75,
            [False, True, True],
        ),  # 0.75 is reached by the second
        ([0.5, 0.25, 0.25], 2.0, [False, False, False]),
        ([0.5, 0.25, 0.25], 0.0, [True, True, True]),
    ],
)
def test_selector_drops_the_weightiest_below_the_threshold(
    weights: list[float], threshold: float, kept: list[bool]
) -> None:
    tokens = torch.ones(1, len(weights), 2)
    actual, keep = select_tokens(tokens, torch.tensor([weights]), threshold)
    assert keep[0].tolist() == kept
    assert torch.equal(actual[0], torch.tensor(kept)[:, None] * tokens[0])


def test_straight_through_gives_the_choice_the_gradient_of_one_minus_the_weight() -> None:
    tokens = torch.randn(2, 4, 3).double()
    weights = torch.randn(2, 4).double().softmax(1).requires_grad_()
    hard, keep = select_tokens(tokens, weights)
    soft, same = select_tokens(tokens, weights, straight_through=True)
    assert not hard.requires_grad
    assert torch.equal(keep, same)
    torch.testing.assert_close(soft, hard, rtol=0, atol=1e-15)
    soft.sum().backward()
    torch.testing.assert_close(weights.grad, -tokens.sum(dim=2))


@EXAMPLES
@given(st.integers(0, 99), st.booleans(), st.sampled_from([2, 3, 4]))
def test_a_pair_does_not_depend_on_its_batch(seed: int, learned: bool, kind: int) -> None:
    # Unlike the authors' code, which mixes the pairs of a block.
    arguments = partial_inputs(pairs=11, seed=seed)
    options = {"kind": kind, "frame_weight_layer": weight_layer() if learned else None}
    whole = tpm_cl(**arguments | options)
    for i in (0, 7, 10):
        one = {n: x[i : i + 1] for n, x in arguments.items() if isinstance(x, Tensor)}
        alone = tpm_cl(**one, **options)
        for name in TpmCl.__dataclass_fields__:
            torch.testing.assert_close(getattr(alone, name), getattr(whole, name)[i : i + 1])


def test_kinds_sum_their_margins() -> None:
    arguments = partial_inputs()
    hinge = {kind: tpm_cl(**arguments, kind=kind).hinge for kind in (2, 3, 4)}
    assert hinge[2].count_nonzero() == hinge[3].count_nonzero() == 3
    torch.testing.assert_close(hinge[2] + hinge[3], hinge[4])
    terms = tpm_cl(**arguments, kind=3, margin=0.25)
    expected = (terms.partial_words_frames - terms.whole_words_frames + 0.25).relu()
    torch.testing.assert_close(terms.hinge, expected)


@pytest.mark.parametrize("straight_through", [False, True])
def test_frame_predictor_learns_only_with_straight_through(straight_through: bool) -> None:
    # As published, the selection has no gradient.
    arguments = partial_inputs()
    predictor = LinearTokenWeights(1, 4, 8).double()
    arguments["frame_weights"] = predictor(arguments["sentence"][:, None], arguments["frames"])
    arguments["word_weights"].requires_grad_()
    hinge = tpm_cl(**arguments, straight_through=straight_through).hinge
    hinge.sum().backward()
    learned = [p.grad is not None and bool(p.grad.any()) for p in predictor.parameters()]
    assert learned == [straight_through] * len(learned)
    assert arguments["word_weights"].grad.count_nonzero() > 0


def test_normalised_partial_words_have_length_one() -> None:
    # As published, their length is at most about 1 - threshold.
    arguments = partial_inputs()
    plain, normalised = (tpm_cl(**arguments, normalise_partial=n) for n in (False, True))
    kept, _ = select_tokens(arguments["words"], arguments["word_weights"])
    length = (arguments["word_weights"][..., None] * kept).sum(1).norm(dim=1)
    assert (length < 0.95).all()
    torch.testing.assert_close(normalised.partial_words_frames * length, plain.partial_words_frames)
    torch.testing.assert_close(normalised.whole_words_frames, plain.whole_words_frames)


@pytest.mark.parametrize("kind", ["linear", "sum", "mean", "max"])
def test_predictors_give_padding_weight_unless_masked(kind: str) -> None:
    # As published, predictors without a mask give weight to padding.
    queries, tokens = torch.randn(2, 3, 16).double(), torch.randn(2, 5, 16).double()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 2, 1, 1, 1]])
    if kind == "linear":
        predictor = LinearTokenWeights(3, 5, 16).double()
    else:
        predictor = AttentionTokenWeights(3, 16, reduce=kind).double()
    published, masked = predictor(queries, tokens), predictor(queries, tokens, mask)
    ones = torch.ones(2).double()
    torch.testing.assert_close(published.sum(1), ones)
    torch.testing.assert_close(masked.sum(1), ones)
    assert (published[0, 3:] > 0).all()
    assert masked[0, 3:].count_nonzero() == 0
    torch.testing.assert_close(masked[1], published[1])


def test_mean_over_heads_is_the_sum_over_their_number_before_joining() -> None:
    queries, tokens = torch.randn(2, 3, 16).double(), torch.randn(2, 5, 16).double()
    by_sum = AttentionTokenWeights(3, 16, reduce="sum").double()
    by_mean = AttentionTokenWeights(3, 16, reduce="mean").double()
    with torch.no_grad():
        by_mean.join.weight.copy_(8 * by_sum.join.weight)
        by_mean.join.bias.copy_(by_sum.join.bias)
    torch.testing.assert_close(by_mean(queries, tokens), by_sum(queries, tokens))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("options", [{}, {"normalise_partial": True}])
def test_gradients_pass_gradcheck(learned: bool, options: dict) -> None:
    arguments = partial_inputs(pairs=2, width=4) | {
        "frame_weight_layer": weight_layer(4) if learned else None
    }
    names = ("sentence", "words", "frames", "word_weights")
    inputs = [arguments[name].clone().requires_grad_() for name in names]

    def hinge(*values: Tensor) -> Tensor:
        return tpm_cl(**arguments | dict(zip(names, values, strict=True)), **options).hinge

    assert torch.autograd.gradcheck(hinge, inputs)


def test_half_precision_features_become_float32() -> None:
    arguments = partial_inputs()
    low = {
        n: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in arguments.items()
    }
    exact = {
        n: x.float() if isinstance(x, Tensor) and n != "frame_mask" else x for n, x in low.items()
    }
    layer = weight_layer().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = tpm_cl(**low | {"frame_weight_layer": layer})
    expected = tpm_cl(**exact | {"frame_weight_layer": layer})
    assert actual.hinge.dtype == torch.float32
    torch.testing.assert_close(actual.hinge, expected.hinge)
    # A layer in bfloat16 accepts the float32 frames.
    coarse = tpm_cl(**low | {"frame_weight_layer": weight_layer().bfloat16()})
    torch.testing.assert_close(coarse.hinge, expected.hinge, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: tpm_cl(**partial_inputs(), kind=5), "kind=5"),
        (lambda: tpm_cl(**partial_inputs(), kind=1), "kind=1"),
        (
            lambda: tpm_cl(**partial_inputs() | {"frame_mask": EMPTY_VIDEO}),
            r"frame_mask\[1\] has no valid slot",
        ),
        (lambda: AttentionTokenWeights(3, 16, reduce="min"), "reduce='min'"),
        (lambda: AttentionTokenWeights(3, 12), "width=12 .* heads=8"),
        (
            lambda: LinearTokenWeights(3, 5, 8)(torch.ones(1, 3, 8), torch.ones(1, 6, 8)),
            "tokens has 6 slots .* built for 5",
        ),
        (
            lambda: AttentionTokenWeights(3, 8)(torch.ones(1, 2, 8), torch.ones(1, 6, 8)),
            "queries has 2 slots .* built for 3",
        ),
    ],
)
def test_errors_name_the_argument(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
