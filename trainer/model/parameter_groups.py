"""Trained parameters and their learning rates: freezing, LoRA, and the optimiser's groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tvr.trainer.config import Freeze, TrainConfig
from tvr.trainer.model.tower_depth import depths

# Projections that LoRA adapts, as in its paper: queries and values, by the names that architectures
# give them. A layer with one product for queries, keys and values is adapted as a whole.
LORA_TARGETS = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("qkv",),
    ("Wqkv",),
)


def freeze(towers: dict[str, Any], what: Freeze) -> None:
    """Freezes whole towers, or the bottom layers and the embeddings of both.

    Args:
        towers: "text" and "image" towers.
        what: Number of bottom layers, or "text", "image" or "both".

    Raises:
        ValueError: a tower has fewer layers, or none that are known.
    """
    for side, tower in towers.items():
        depth, layers = depths(tower)
        if isinstance(what, int) and what and not layers:
            raise ValueError(
                f"model.freeze={what}: the {side} tower {type(tower).__name__} has no list of"
                f" layers by a known name; freeze {side} or both, or nothing"
            )
        if isinstance(what, int) and what > layers:
            raise ValueError(f"model.freeze={what}: the {side} tower has only {layers} layers")
        for name, parameter in tower.named_parameters():
            if isinstance(what, int):
                frozen = what > 0 and depth[name] > layers - what
            else:
                frozen = what in (side, "both")
            if frozen:
                parameter.requires_grad_(False)


def add_adapters(towers: dict[str, Any], rank: int) -> None:
    """Freezes the towers and adds LoRA to queries and values, with scale 2 and initial product 0.

    Raises:
        ValueError: peft is not installed, or a tower has no queries and values.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            f"model.lora_rank={rank} needs peft (pip install 'tvr[lora]'): {error}"
        ) from None
    for side, tower in towers.items():
        settings = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=_lora_targets(side, tower, rank)
        )
        inject_adapter_in_model(settings, tower)


def _lora_targets(side: str, tower: nn.Module, rank: int) -> list[str]:
    linear = {
        name.rpartition(".")[2]
        for name, module in tower.named_modules()
        if isinstance(module, nn.Linear)
    }
    for targets in LORA_TARGETS:
        if linear.issuperset(targets):
            return list(targets)
    known = "; ".join(" and ".join(targets) for targets in LORA_TARGETS)
    raise ValueError(
        f"model.lora_rank={rank}: the {side} tower {type(tower).__name__} has no linear layers"
        f" named {known}, which LoRA adapts; set model.lora_rank to 0, and model.freeze"
    )


def merge_adapters(tower: nn.Module) -> None:
    """Merges LoRA's products into the weights and removes the LoRA layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(tower.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(tower.get_submodule(parent), child, layer.get_base_layer())


def has_same_groups(model: Any, one: TrainConfig, other: TrainConfig) -> bool:
    """True if both settings put the same parameters into each group, in the same order.

    The saved state of an optimiser holds one flat tensor a group.
    """
    (first, second) = (
        [
            [id(parameter) for parameter in members["params"]]
            for members in parameter_groups(model, train)
        ]
        for train in (one, other)
    )
    return first == second


def parameter_groups(model: Any, train: TrainConfig) -> list[dict[str, Any]]:
    """Groups the trained parameters: towers and heads, each with and without weight decay.

    `train.layer_decay` makes such a pair for each depth of the towers. Biases and norms never
    decay. Frozen parameters are in no group.

    Returns:
        Groups for `torch.optim`, each with `name` ("encoder" or "head") and `peak`, its highest
        learning rate.

    Raises:
        ValueError: every parameter is frozen.
    """
    exempt = {p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    towers: Mapping[str, Any] = {
        "text_tower.": depths(model.text_tower)[0],
        "image_tower.": depths(model.image_tower)[0],
    }
    groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, peak = "head", train.learning_rate
        for prefix, depth in towers.items():
            if name.startswith(prefix):
                below = depth[name.removeprefix(prefix)]
                owner, peak = "encoder", train.encoder_learning_rate * train.layer_decay**below
        # CLIP's class vector is one-dimensional like a bias; CLIP does not decay it either.
        decays = parameter.ndim > 1 and parameter not in exempt
        groups.setdefault((owner, peak, decays), []).append(parameter)
    if not groups:
        raise ValueError("nothing is left to train: model.freeze freezes every weight of the model")
    return [
        {
            "params": members,
            "name": owner,
            "peak": peak,
            "lr": peak,
            "weight_decay": train.weight_decay if decays else 0.0,
        }
        for (owner, peak, decays), members in groups.items()
    ]
