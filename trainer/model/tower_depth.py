"""Where a tower's parameters lie: in which of its layers, below them, or above them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# Lists of layers, and in pyramids of stages with layers within. The first match counts.
_LAYER = re.compile(r"\b(?:layers?|blocks?|stages)\.(\d+)\.(?:(?:layers|blocks)\.)?(?:(\d+)\.)?")
# What feeds the first layer, or all of them; "pre_layrnorm" is CLIP's spelling of the norm there.
_BELOW = re.compile(
    r"\b(embeddings|embedder|patch_embed|pos_embed|cls_token|reg_token|norm_pre|stem|conv_stem"
    r"|pre_layrnorm|relative_attention_bias)\b"
)
# What scales down to a stage; all else of a stage comes after its layers.
_ENTERS_STAGE = re.compile(r"downsampl|patch_embedding")
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


def _of_stage(layers: Iterable[tuple[int, int]], stage: int) -> list[int]:
    return [rank for rank, place in enumerate(layers) if place[0] == stage]
