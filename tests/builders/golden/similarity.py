"""Computes the golden similarity cases with the code under test."""

import re
from functools import cache
from typing import Any

import torch
from builders.golden.archives import golden, leaves, tensor
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


# Chunk sizes: one text, one that divides nothing, more than there are.
WAYS: dict[str, dict[str, Any]] = {
    "reference": {},
    "compiled": {"backend": "compiled"},
    "tiles of 1": {"chunk": 1},
    "tiles of 4": {"chunk": 4},
    "tiles of 100": {"chunk": 100},
    "dense": {"backend": "dense"},
    "dense of 4": {"backend": "dense", "chunk": 4},
}


def weight_layer(file: str, prefix: str) -> TokenWeightLayer:
    """A `TokenWeightLayer` with golden parameters, whose names have no index for arch 1."""
    stored = {n.removeprefix(prefix): tensor(file, n) for n in golden(file) if n.startswith(prefix)}
    arch = len([name for name in stored if name.endswith("weight")])
    layer = TokenWeightLayer(stored[next(iter(stored))].shape[1], arch).double()
    layer.layers.load_state_dict({n if "." in n else f"0.{n}": v for n, v in stored.items()})
    return layer


def layer_gradients(layer: TokenWeightLayer, prefix: str) -> dict[str, Tensor]:
    """Gradients of a weight layer under the names of the golden arrays."""
    single = len(layer.layers) == 1
    return {
        prefix + (name.removeprefix("0.") if single else name): parameter.grad
        for name, parameter in layer.layers.named_parameters()
        if parameter.grad is not None
    }


@cache
def results(file: str, case: str, way: str = "reference") -> dict[str, Tensor]:
    """Similarity of one case and its gradients, under the names of the golden arrays."""
    masks, interaction, neighbours = case.split(".")
    features = leaves(file, ["text", "word", "video"])
    options = {"interaction": interaction, "neighbour_frames": neighbours == "nfc1"}
    layers = {}
    if interaction.endswith("wti"):
        names = ("text_weight_fc", "video_weight_fc")
        layers = {name: weight_layer(file, f"param.{name}.") for name in names}
        options["word_logits"] = layers["text_weight_fc"](features["word"])
        options["frame_logits"] = layers["video_weight_fc"](features["video"])
    function = reference.dmae_similarity if way == "reference" else similarity.dmae_similarity
    options |= WAYS[way]
    scores = function(
        features["text"].squeeze(1),
        features["word"],
        features["video"],
        tensor(file, f"{masks}.word_mask"),
        tensor(file, f"{masks}.video_mask"),
        **options,
    )
    (scores * tensor(file, "cotangent")).sum().backward()

    result = {f"{case}.sim": scores}
    for name, feature in features.items():
        if feature.grad is not None:
            result[f"{case}.grad.{name}"] = feature.grad
    for name, layer in layers.items():
        result |= layer_gradients(layer, f"{case}.grad.param.{name}.")
    # `wti` does not use the text layer, so its golden gradient is 0.
    for name in golden(file):
        if name.startswith(f"{case}.grad.param.text_weight_fc.") and name not in result:
            result[name] = torch.zeros(golden(file)[name].shape, dtype=torch.float64)
    return result


def header_results() -> dict[str, Tensor]:
    """Outputs of the sequence header and their gradient."""
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
    # With one token per frame, the only supported case, the mask does not change.
    return {"out": out, "grad.video": video.grad, "out_mask": mask}
