"""Starts a model from the weights of another one, by names and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from torch import Tensor, nn

from tvr.trainer.config import HeadPart, InitPart, TowerPart

TOWERS: tuple[str, ...] = get_args(TowerPart)
HEADS: tuple[str, ...] = get_args(HeadPart)
# LoRA's scale: `parameter_groups.add_adapters` sets alpha to twice the rank.
LORA_SCALE = 2.0
# Names of weights in an error, for each way in which they do not fit.
MAX_NAMED = 8


def parts_of(names: Sequence[InitPart]) -> tuple[str, ...]:
    """The parts of a model that `model.init_parts` names; all of them for an empty list."""
    if not names:
        return TOWERS + HEADS
    groups = {"towers": TOWERS, "heads": HEADS}
    found = [part for name in names for part in groups.get(name, (name,))]
    return tuple(dict.fromkeys(found))


def load_initial(
    model: nn.Module, weights: Mapping[str, Tensor], names: Sequence[InitPart], source: str
) -> None:
    """Loads parts of another model's weights; the other parts of the model stay as they are.

    Args:
        model: Model without LoRA.
        weights: Whole weights of the other model, without LoRA (`merged_adapters`).
        names: `model.init_parts`.
        source: Origin of the weights, for errors.

    Raises:
        ValueError: a weight is missing, unexpected or has another shape, or a named part is in
            neither model; names them all. Nothing is loaded then.
    """
    parts = parts_of(names)
    own, given = _within(model.state_dict(), parts), _within(weights, parts)
    found = {name.split(".")[0] for name in (*own, *given)}
    absent = [name for name in names if not found & set(parts_of([name]))]
    wrong = [f"neither model has the part {name}" for name in absent]
    wrong += _listed("it lacks", [name for name in own if name not in given])
    wrong += _listed("this model has no", [name for name in given if name not in own])
    wrong += _listed(
        "other shapes:",
        [
            f"{name} {tuple(given[name].shape)}, here {tuple(value.shape)}"
            for name, value in own.items()
            if name in given and given[name].shape != value.shape
        ],
    )
    if wrong:
        raise ValueError(
            f"model.init_from={source} does not fit this model: {'; '.join(wrong)}. Give the"
            " settings of that model, or name the parts that fit by model.init_parts (towers,"
            f" heads, {', '.join(TOWERS + HEADS)})"
        )
    model.load_state_dict(given, strict=False)


def merged_adapters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model with LoRA, its products added to the layers that they adapt."""
    merged = {}
    for name, value in weights.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        layer, adapted, kind = name.rpartition(".base_layer.")
        if adapted and kind == "weight":
            down, up = (weights[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            value = value + (up @ down) * LORA_SCALE
        merged[f"{layer}.{kind}" if adapted else name] = value
    return merged


def _within(weights: Mapping[str, Tensor], parts: Iterable[str]) -> dict[str, Tensor]:
    wanted = frozenset(parts)
    return {name: value for name, value in weights.items() if name.split(".")[0] in wanted}


def _listed(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = len(names) - MAX_NAMED
    listed = ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
    return [f"{what} {listed}"]
