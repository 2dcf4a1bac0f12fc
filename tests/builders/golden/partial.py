"""Computes the golden TPM-CL cases with the code under test."""

from functools import cache

import torch
from builders.golden.archives import golden, leaves, tensor
from builders.golden.similarity import layer_gradients, weight_layer
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


def linear_predictor(file: str, prefix: str) -> LinearTokenWeights:
    """A `LinearTokenWeights` with golden parameters."""
    stored = {ours: tensor(file, prefix + theirs) for ours, theirs in LINEAR_NAMES.items()}
    num_tokens, num_queries = stored["mix.weight"].shape
    predictor = LinearTokenWeights(num_queries, num_tokens, stored["norm.bias"].shape[1] // 2)
    predictor.double().load_state_dict(stored)
    return predictor


def parameter_gradients(module: nn.Module, names: dict[str, str], prefix: str) -> dict[str, Tensor]:
    """Gradients under the golden names; an unused parameter has gradient 0."""
    return {
        prefix + names[name]: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters()
    }


def similarities(terms: TpmCl) -> Tensor:
    """The five similarities of each pair, in the order of the golden arrays."""
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
    """Weights of a predictor and their gradients."""
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
    """Selected tokens, the mask of kept ones, and the gradient."""
    file = "predictors.npz"
    tokens = tensor(file, f"{case}.x", leaf=True)
    threshold = float(case.removeprefix("selector"))
    kept, keep = select_tokens(tokens, tensor(file, f"{case}.weight"), threshold)
    (kept * tensor(file, f"{case}.cotangent")).sum().backward()
    return {f"{case}.y": kept, f"{case}.policy": keep, f"{case}.grad.x": tokens.grad}


@cache
def tpm_results(file: str, case: str) -> dict[str, Tensor]:
    """Loss and similarities of TPM-CL on matched pairs, and all gradients."""
    interaction, kind = case.split(".")
    features = leaves(file, ["text", "word", "video"])
    sentence, words, frames = features["text"].squeeze(1), features["word"], features["video"]
    frame_predictor = linear_predictor(file, "param.t2v_linear_xwp.")
    word_predictor = linear_predictor(file, "param.v2t_linear_xwp.")
    layer = None
    if interaction == "att_wti":
        layer = weight_layer(file, "param.video_weight_fc.")
    word_weights, frame_weights = (
        word_predictor(frames, words),
        frame_predictor(sentence[:, None], frames),
    )
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
    result = {f"{case}.pair.loss": loss, f"{case}.pair.sims": similarities(terms)}
    for name, x in features.items():  # margin 3 does not use the sentence
        result[f"{case}.pair.grad.{name}"] = torch.zeros_like(x) if x.grad is None else x.grad
    if file == "tpmcl.npz":
        prefix = f"{case}.pair.grad.param."
        result |= parameter_gradients(frame_predictor, LINEAR_NAMES, f"{prefix}t2v_linear_xwp.")
        result |= parameter_gradients(word_predictor, LINEAR_NAMES, f"{prefix}v2t_linear_xwp.")
        result |= {"token_weight": word_weights, "frame_weight": frame_weights}
        result["token_keep"] = select_tokens(words, word_weights, threshold)[1]
        result["frame_keep"] = select_tokens(frames, frame_weights, threshold)[1]
    if layer is not None:
        result |= layer_gradients(layer, f"{case}.pair.grad.param.video_weight_fc.")
        for name in ("text_weight_fc.weight", "text_weight_fc.bias"):  # not used by TPM-CL
            result[f"{case}.pair.grad.param.{name}"] = torch.zeros_like(
                tensor(file, f"param.{name}")
            )
    if file == "tpmcl.npz" and interaction == "ti":
        # With up to 8 pairs and no learned weights, the authors' batch (`ref.*`) is correct, too.
        result |= {
            name.replace(".pair.", ".ref."): x for name, x in result.items() if ".pair." in name
        }
        del result[f"{case}.ref.sims"]
    return result
