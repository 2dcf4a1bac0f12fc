"""The layers of a tower, and where its parameters lie: in a layer, below, or above them all."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache, partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

# Lists of layers, and in pyramids of stages with layers within. The first match counts.
_LAYER = re.compile(r"\b(?:layers?|blocks?|stages)\.(\d+)\.(?:(?:layers|blocks)\.)?(?:(\d+)\.)?")
# What feeds the first layer, or all of them; "pre_layrnorm" is CLIP's spelling of the norm there.
_BELOW = re.compile(
    r"\b(embeddings|embedder|patch_embed|pos_embed|cls_token|reg_token|norm_pre|stem|conv_stem"
    r"|pre_layrnorm|relative_attention_bias)\b"
)
# What scales down to a stage; all else of a stage comes after its layers, as `downsample` in Swin.
_ENTERS_STAGE = re.compile(
    r"downsampling_layer|downsample_layers|patch_embedding|^timm_model\..*downsample"
)
_PVT_STAGE = re.compile(r"\bpatch_embeddings\.(\d+)\.")


def depths(tower: Any) -> tuple[dict[str, int], int]:
    """Returns how far below a tower's top each of its parameters is, and the number of layers.

    0 is above the layers (norm, projection, pooling), 1 the top layer, n the bottom layer of n, and
    n + 1 the embeddings. A pyramid's layers are those of all its stages; what leads into a stage
    counts with the stage's first layer, what ends a stage with its last one. A tower without a list
    of layers has n = 0.
    """
    names = [name for name, _ in tower.named_parameters()]
    places = {name: _LAYER.search(name) for name in names}
    found = {
        (int(match[1]), -1 if match[2] is None else int(match[2]))
        for match in places.values()
        if match
    }
    is_pyramid = any(inner >= 0 for _, inner in found)
    layers = sorted(place for place in found if place[1] >= 0 or not is_pyramid)
    result = {}
    for name, match in places.items():
        if match is None:
            stage = _PVT_STAGE.search(name)
            if stage and int(stage[1]):
                rank = _of_stage(layers, int(stage[1]))[0]
            else:
                below = stage or _BELOW.search(name)
                result[name] = len(layers) + 1 if below else 0
                continue
        elif match[2] is not None or not is_pyramid:
            rank = layers.index((int(match[1]), -1 if match[2] is None else int(match[2])))
        else:
            members = _of_stage(layers, int(match[1]))
            enters = _ENTERS_STAGE.search(name)
            if enters and members[0] == 0:
                result[name] = len(layers) + 1  # into the first stage: the embeddings
                continue
            rank = members[0] if enters else members[-1]
        result[name] = len(layers) - rank
    return result, len(layers)


def tower_layers(tower: nn.Module) -> list[GradientCheckpointingLayer]:
    """Returns the layers of a tower, each of which can be recomputed or compiled alone.

    They are transformers' own kind of layer. Where an architecture has others, its layers get that
    kind's call beside their class.

    Raises:
        ValueError: the tower has no list of layers by a known name.
    """
    own = [layer for layer in tower.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if own:
        # Swin has such layers within such stages: the smaller unit counts.
        outer = {
            id(layer)
            for layer in own
            for each in layer.modules()
            if each is not layer and isinstance(each, GradientCheckpointingLayer)
        }
        return [layer for layer in own if id(layer) not in outer]
    places: dict[str, tuple[int, int]] = {}
    for name, _ in tower.named_parameters():
        if match := _LAYER.search(name):
            place = (int(match[1]), -1 if match[2] is None else int(match[2]))
            places[name[: match.end()].rstrip(".")] = place
    is_pyramid = any(inner >= 0 for _, inner in places.values())
    found: list[Any] = [
        tower.get_submodule(path)
        for path, place in places.items()
        if place[1] >= 0 or not is_pyramid
    ]
    if not found:
        raise ValueError(
            f"train.activation_checkpointing and train.compile work on single layers, and the tower"
            f" {type(tower).__name__} has no list of layers by a known name; turn both off"
        )
    for layer in found:
        layer.__class__ = _recomputable(type(layer))
    return found


@cache
def _recomputable(layer: type) -> type:
    return type(layer.__name__, (GradientCheckpointingLayer, layer), {})


def _of_stage(layers: Iterable[tuple[int, int]], stage: int) -> list[int]:
    return [rank for rank, place in enumerate(layers) if place[0] == stage]


def checkpoint_activations(model: Any) -> None:
    """Turns on activation checkpointing: the backward recomputes the towers' layers.

    Raises:
        ValueError: the layers of a tower are not known.
    """
    recompute: Any = partial(checkpoint, use_reentrant=False)
    for tower in (model.text_tower, model.image_tower):
        # What transformers' own method does under several names, without its hook that makes the
        # embeddings require gradients: the backward would then run through frozen layers.
        for layer in tower_layers(tower):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = recompute
