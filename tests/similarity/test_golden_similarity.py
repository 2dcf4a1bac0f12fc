"""The similarity equals the reference implementation's, value and every gradient, in float64.

Verdicts that these arrays hold us to (match): a masked slot counts as similarity 0; neighbour
frames enter the text-to-video part only, with zero diagonal; a word of mask 2 counts twice, with
renormalisation in the ti family and without in the wti family; the sentence takes the mask of the
first word slot; maxima belong to the first argument.
"""

import re
from functools import cache
from typing import Any

import pytest
import torch
from builders.golden_files import assert_equals_golden, golden, leaves, tensor
from torch import Tensor

from tvr.kernels import reference, similarity
from tvr.kernels.weight_layers import SequenceHeader, TokenWeightLayer

FILES = [f"sim_{kind}.npz" for kind in ("rect", "square", "big", "arch2", "arch3")]
CASES = [
    (file, name.removesuffix(".sim"))
    for file in FILES
    for name in sorted(golden(file))
    if re.fullmatch(r"\w+\.\w+\.nfc[01]\.sim", name)
]


# Chunks: single texts, uneven, more than there are.
WAYS: dict[str, dict[str, Any]] = {
    "reference": {},
    "compiled": {"backend": "compiled"},
    "tiles of 1": {"chunk": 1},
    "tiles of 4": {"chunk": 4},
    "tiles of 100": {"chunk": 100},
}


def weight_layer(file: str, prefix: str) -> TokenWeightLayer:
    """Our layer with the reference's parameters; arch 1 has no index in their names."""
    stored = {n.removeprefix(prefix): tensor(file, n) for n in golden(file) if n.startswith(prefix)}
    arch = len([name for name in stored if name.endswith("weight")])
    layer = TokenWeightLayer(stored[next(iter(stored))].shape[1], arch).double()
    layer.layers.load_state_dict({n if "." in n else f"0.{n}": v for n, v in stored.items()})
    return layer


def layer_gradients(layer: TokenWeightLayer, prefix: str) -> dict[str, Tensor]:
    single = len(layer.layers) == 1
    return {
        prefix + (name.removeprefix("0.") if single else name): parameter.grad
        for name, parameter in layer.layers.named_parameters()
        if parameter.grad is not None
    }


@cache
def results(file: str, case: str, way: str = "reference") -> dict[str, Tensor]:
    """The similarity of one case and its gradients, under the names of the golden arrays."""
    masks, interaction, neighbours = case.split(".")
    features = leaves(file, ["text", "word", "video"])
    options = {"interaction": interaction, "neighbour_frames": neighbours == "nfc1"}
    layers = {}
    if interaction.endswith("wti"):
        names = ("text_weight_fc", "video_weight_fc")
        layers = {name: weight_layer(file, f"param.{name}.") for name in names}
        options["word_logits"] = layers["text_weight_fc"](features["word"])
        options["frame_logits"] = layers["video_weight_fc"](features["video"])
    door = reference.dmae_similarity if way == "reference" else similarity.dmae_similarity
    options |= WAYS[way]
    scores = door(
        features["text"].squeeze(1),
        features["word"],
        features["video"],
        tensor(file, f"{masks}.word_mask"),
        tensor(file, f"{masks}.video_mask"),
        **options,
    )
    (scores * tensor(file, "cotangent")).sum().backward()

    found = {f"{case}.sim": scores}
    for name, feature in features.items():
        if feature.grad is not None:
            found[f"{case}.grad.{name}"] = feature.grad
    for name, layer in layers.items():
        found |= layer_gradients(layer, f"{case}.grad.param.{name}.")
    # `wti` never asks the text layer: the sentence is one token, so the reference's gradient is 0.
    for name in golden(file):
        if name.startswith(f"{case}.grad.param.text_weight_fc.") and name not in found:
            found[name] = torch.zeros(golden(file)[name].shape, dtype=torch.float64)
    return found


def header_results() -> dict[str, Tensor]:
    file = "seqtransf.npz"
    video = tensor(file, "video", leaf=True)
    mask = tensor(file, "video_mask")
    header = SequenceHeader(64, num_layers=1, num_positions=video.shape[1]).double()
    header.load_state_dict(
        {
            "positions": tensor(file, "param.frame_position_embeddings.weight"),
            **{
                f"blocks.0.{ours}{dot}{kind}": tensor(
                    file, f"param.transformerClip.resblocks.0.{theirs}{kind}"
                )
                for ours, theirs, dot in (
                    ("in_projection", "attn.in_proj_", "."),
                    ("out_projection", "attn.out_proj.", "."),
                    ("attention_norm", "ln_1.", "."),
                    ("mlp_norm", "ln_2.", "."),
                    ("mlp_in", "mlp.c_fc.", "."),
                    ("mlp_out", "mlp.c_proj.", "."),
                )
                for kind in ("weight", "bias")
            },
        }
    )
    out = header(video, mask)
    (out * tensor(file, "cotangent")).sum().backward()
    # With one token per frame (verdict: several are not offered) the mask passes through.
    return {"out": out, "grad.video": video.grad, "out_mask": mask}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("file", "case"), CASES)
def test_similarity_equals_the_golden_arrays(file: str, case: str, way: str) -> None:
    assert_equals_golden(file, results(file, case, way))


def test_sequence_header_equals_the_golden_arrays() -> None:
    assert_equals_golden("seqtransf.npz", header_results())


@pytest.mark.parametrize("case", ["twm.att_wti.nfc1", "ragged.att_ti.nfc1"])
def test_float32_scores_are_within_1e5_of_the_golden_arrays(case: str) -> None:
    file = "sim_rect.npz"
    masks, interaction, _ = case.split(".")
    single = {name: tensor(file, name).float() for name in ("text", "word", "video")}
    logits = {}
    if interaction.endswith("wti"):
        for kind, prefix in (("word", "text"), ("frame", "video")):
            layer = weight_layer(file, f"param.{prefix}_weight_fc.").float()
            logits[f"{kind}_logits"] = layer(single["word" if kind == "word" else "video"])
    scores = similarity.dmae_similarity(
        single["text"].squeeze(1),
        single["word"],
        single["video"],
        tensor(file, f"{masks}.word_mask"),
        tensor(file, f"{masks}.video_mask"),
        interaction=interaction,
        **logits,
    )
    assert scores.dtype == torch.float32
    expected = tensor(file, f"{case}.sim").float()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
