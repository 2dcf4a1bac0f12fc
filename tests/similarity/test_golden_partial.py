"""Token weights, selector and TPM-CL equal the reference implementation's, in float64.

Verdicts. Differ: only matched pairs enter, each with its own frame weights and its own video
(`pair.*`), where the reference sums weights over its block and mismatches pairs in batches above 8
(`ref.*`). Match: the choice of tokens has no gradient, so the frame predictor never learns; the
partial words are not normalised; predictors see padding.
"""

import re
from functools import cache

import pytest
import torch
from builders.golden_files import assert_equals_golden, golden, leaves, tensor
from test_golden_similarity import layer_gradients, weight_layer
from torch import Tensor, nn

from tvr.kernels.partial import (
    AttentionTokenWeights,
    LinearTokenWeights,
    TpmCl,
    select_tokens,
    tpm_cl,
)

LINEAR_NAMES = {
    "mix.weight": "qk_proj.weight",
    "norm.weight": "attn_proj.0.weight",
    "norm.bias": "attn_proj.0.bias",
    "hidden.weight": "attn_proj.1.weight",
    "score.weight": "attn_proj.3.weight",
}
ATTENTION_NAMES = {"join.weight": "attn_proj.weight", "join.bias": "attn_proj.bias"}
PREDICTORS = ("linear_t2v", "linear_v2t", "attention_v2t_sum", "attention_v2t_max")
SELECTORS = ("selector0.3", "selector0.6", "selector0.9")
TPM_CASES = [
    (file, name.removesuffix(".pair.loss"))
    for file in ("tpmcl.npz", "tpmcl_blockbug.npz", "tpmcl_blockbug2.npz")
    for name in sorted(golden(file))
    if name.endswith(".pair.loss")
]
BLOCK_MATRICES = ("t2vh", "t2vhh", "tg2vh", "tg2vhh", "tgh2vh")


def linear_predictor(file: str, prefix: str) -> LinearTokenWeights:
    stored = {ours: tensor(file, prefix + theirs) for ours, theirs in LINEAR_NAMES.items()}
    num_tokens, num_queries = stored["mix.weight"].shape
    predictor = LinearTokenWeights(num_queries, num_tokens, stored["norm.bias"].shape[1] // 2)
    predictor.double().load_state_dict(stored)
    return predictor


def parameter_gradients(module: nn.Module, names: dict[str, str], prefix: str) -> dict[str, Tensor]:
    """Gradients under the reference's names; a parameter that never took part counts as 0."""
    return {
        prefix + names[name]: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters()
    }


def similarities(terms: TpmCl) -> Tensor:
    return torch.stack(
        [
            terms.sentence_frames,
            terms.sentence_partial_frames,
            terms.whole_words_frames,
            terms.whole_words_partial_frames,
            terms.partial_words_frames,
        ]
    )


@cache
def predictor_results(case: str) -> dict[str, Tensor]:
    file = "predictors.npz"
    queries, tokens = tensor(file, f"{case}.q", leaf=True), tensor(file, f"{case}.k", leaf=True)
    if case.startswith("linear"):
        names, predictor = LINEAR_NAMES, linear_predictor(file, f"{case}.param.")
    else:
        names = ATTENTION_NAMES
        predictor = AttentionTokenWeights(
            queries.shape[1], queries.shape[2], reduce=case.split("_")[-1]
        ).double()
        predictor.load_state_dict(
            {ours: tensor(file, f"{case}.param.{theirs}") for ours, theirs in names.items()}
        )
    weights = predictor(queries, tokens)
    (weights * tensor(file, f"{case}.cotangent")).sum().backward()
    return {
        f"{case}.out": weights,
        f"{case}.grad.q": queries.grad,
        f"{case}.grad.k": tokens.grad,
        **parameter_gradients(predictor, names, f"{case}.grad.param."),
    }


@cache
def selector_results(case: str) -> dict[str, Tensor]:
    file = "predictors.npz"
    tokens = tensor(file, f"{case}.x", leaf=True)
    threshold = float(case.removeprefix("selector"))
    kept, keep = select_tokens(tokens, tensor(file, f"{case}.weight"), threshold)
    (kept * tensor(file, f"{case}.cotangent")).sum().backward()
    return {f"{case}.y": kept, f"{case}.policy": keep, f"{case}.grad.x": tokens.grad}


@cache
def tpm_results(file: str, case: str) -> dict[str, Tensor]:
    interaction, kind = case.split(".")
    features = leaves(file, ["text", "word", "video"])
    sentence, words, frames = features["text"].squeeze(1), features["word"], features["video"]
    of_frames = linear_predictor(file, "param.t2v_linear_xwp.")
    of_words = linear_predictor(file, "param.v2t_linear_xwp.")
    layer = None
    if interaction == "att_wti":
        layer = weight_layer(file, "param.video_weight_fc.")
    word_weights, frame_weights = of_words(frames, words), of_frames(sentence[:, None], frames)
    threshold = float(golden(file)["thresh"])
    terms = tpm_cl(
        sentence,
        words,
        frames,
        tensor(file, "video_mask"),
        word_weights=word_weights,
        frame_weights=frame_weights,
        frame_weight_layer=layer,
        kind=int(kind.removeprefix("type")),
        threshold=threshold,
        margin=float(golden(file)["margin"]),
    )
    loss = terms.hinge.mean()
    loss.backward()
    found = {f"{case}.pair.loss": loss, f"{case}.pair.sims": similarities(terms)}
    for name, x in features.items():  # margin 3 never looks at the sentence
        found[f"{case}.pair.grad.{name}"] = torch.zeros_like(x) if x.grad is None else x.grad
    if file == "tpmcl.npz":
        prefix = f"{case}.pair.grad.param."
        found |= parameter_gradients(of_frames, LINEAR_NAMES, f"{prefix}t2v_linear_xwp.")
        found |= parameter_gradients(of_words, LINEAR_NAMES, f"{prefix}v2t_linear_xwp.")
        found |= {"token_weight": word_weights, "frame_weight": frame_weights}
        found["token_keep"] = select_tokens(words, word_weights, threshold)[1]
        found["frame_keep"] = select_tokens(frames, frame_weights, threshold)[1]
    if layer is not None:
        found |= layer_gradients(layer, f"{case}.pair.grad.param.video_weight_fc.")
        for name in ("text_weight_fc.weight", "text_weight_fc.bias"):  # takes no part in TPM-CL
            found[f"{case}.pair.grad.param.{name}"] = torch.zeros_like(
                tensor(file, f"param.{name}")
            )
    if file == "tpmcl.npz" and interaction == "ti":
        # Up to 8 pairs and without learned weights the reference's own batch is right as well.
        found |= {
            name.replace(".pair.", ".ref."): x for name, x in found.items() if ".pair." in name
        }
        del found[f"{case}.ref.sims"]
    return found


def test_every_array_of_the_reference_is_reached() -> None:
    assert len(TPM_CASES) == 6 + 2 + 1


@pytest.mark.parametrize("case", PREDICTORS)
def test_token_weights_equal_the_golden_arrays(case: str) -> None:
    assert_equals_golden("predictors.npz", predictor_results(case))


@pytest.mark.parametrize("case", SELECTORS)
def test_selector_equals_the_golden_arrays(case: str) -> None:
    # Row 1 has equal weights: which tokens are dropped is the sort's choice, how many is not.
    found = selector_results(case)
    for name, value in found.items():
        expected = tensor("predictors.npz", name)
        rows = [0, *range(2, len(expected))]
        torch.testing.assert_close(value[rows].double(), expected[rows], rtol=1e-9, atol=1e-12)
    expected = tensor("predictors.npz", f"{case}.policy")
    assert int(found[f"{case}.policy"][1].sum()) == int(expected[1].sum())


@pytest.mark.parametrize(("file", "case"), TPM_CASES)
def test_tpm_cl_equals_the_matched_pair_arrays(file: str, case: str) -> None:
    assert_equals_golden(file, tpm_results(file, case))


@pytest.mark.parametrize(
    ("file", "case"),
    [x for x in TPM_CASES if "blockbug" in x[0] or x[1].startswith("att_wti")],
)
def test_tpm_cl_differs_from_the_reference_where_its_blocks_mix_pairs(file: str, case: str) -> None:
    ours = tpm_results(file, case)
    loss = tensor(file, f"{case}.ref.loss")
    assert abs(ours[f"{case}.pair.loss"] - loss) > 1e-3
    gradient = tensor(file, f"{case}.ref.grad.video")
    assert (ours[f"{case}.pair.grad.video"] - gradient).abs().max() > 1e-4


def test_tpm_cl_equals_the_diagonal_of_the_reference_matrices() -> None:
    sims = tpm_results("tpmcl.npz", "ti.type4")["ti.type4.pair.sims"]
    for ours, name in zip(sims, BLOCK_MATRICES, strict=True):
        matrix = tensor("tpmcl.npz", f"ti.blockmatrix.{name}")
        torch.testing.assert_close(ours.detach(), matrix.diagonal(), rtol=1e-9, atol=1e-12)


def test_frame_predictor_gets_no_gradient_as_published() -> None:
    found = tpm_results("tpmcl.npz", "att_wti.type4")
    frame_side = [x for name, x in found.items() if re.search(r"grad\.param\.t2v_", name)]
    word_side = [x for name, x in found.items() if re.search(r"grad\.param\.v2t_", name)]
    assert all(x.count_nonzero() == 0 for x in frame_side)
    assert all(x.count_nonzero() > 0 for x in word_side)
