"""One form for the state of training, whatever number of ranks and ZeRO stage it comes from.

DeepSpeed's universal checkpoint holds a folder for each parameter with its float32 value and the
two moments of Adam. Its converter writes it in a form that only the stage it came from can load:
ZeRO-3 loses shapes and steps, ZeRO-1/2 lacks what ZeRO-3 asks for, and stage 0 has no converter.
What is written here loads at every stage.

    zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt     of each trained parameter
    frozen.pt                                       the others' values by name, if there are any
    zero/optimizer_state.pt
    mp_rank_00_model_states.pt, zero_pp_rank_R_mp_rank_00_model_states.pt    counters
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VALUES = ("fp32", "exp_avg", "exp_avg_sq")
MODEL_STATES = "mp_rank_00_model_states.pt"
FROZEN = "frozen.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class UniversalTarget:
    """Who will load the state."""

    world_size: int
    num_groups: int
    """Of parameters in the optimiser."""
    shapes: Mapping[str, torch.Size]
    """Of the trained parameters, in the optimiser's order."""
    frozen: frozenset[str] = frozenset()
    """Names of the other parameters."""


def normalise(folder: Path, reader: UniversalTarget) -> None:
    """Brings what DeepSpeed's converter wrote to `folder` into the one form, in place."""
    zero = folder / "zero"
    common = _read(zero / "optimizer_state.pt")
    step = _step(common, zero / next(iter(reader.shapes)))
    for name, shape in reader.shapes.items():
        values = {kind: _tensor(zero / name / f"{kind}.pt") for kind in VALUES}
        _write_parameter(zero / name, {k: v.reshape(shape) for k, v in values.items()}, step)
    counters = _read(sorted(folder.glob("*model_states.pt"))[0])
    _write_common(zero, step, counters["ds_version"], reader.num_groups)
    _write_counters(folder, counters, reader.world_size)


def convert_stage_0(shards: Path, folder: Path, reader: UniversalTarget) -> None:
    """Writes the one form of a checkpoint without ZeRO."""
    saved = _read(shards / MODEL_STATES)
    moments = saved["optimizer"]["state"]
    step = next(iter(moments.values()))["step"]
    for index, name in enumerate(reader.shapes):
        values = {"fp32": saved["module"][name].float()}
        values |= {kind: moments[index][kind] for kind in VALUES[1:]}
        _write_parameter(folder / "zero" / name, values, step)
    _write_common(folder / "zero", step, saved["ds_version"], reader.num_groups)
    _write_counters(folder, saved, reader.world_size)


def write_frozen_weights(
    folder: Path, weights: Mapping[str, Tensor], reader: UniversalTarget
) -> None:
    """Writes what no optimiser holds, for `load_frozen_weights`."""
    torch.save({name: weights[name].clone() for name in reader.frozen}, folder / FROZEN)


def load_frozen_weights(model: nn.Module, folder: Path) -> None:
    """Gives a model that is not partitioned yet the frozen weights of the universal form."""
    if (folder / FROZEN).exists():
        model.load_state_dict(_read(folder / FROZEN), strict=False)


def _write_parameter(folder: Path, values: Mapping[str, Tensor], step: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, value in values.items():
        torch.save({"param": value.detach().clone(), "cat_dim": 0}, folder / f"{kind}.pt")
    torch.save(step, folder / "step.pt")


def _write_common(zero: Path, step: Tensor, ds_version: str, num_groups: int) -> None:
    """What the loaders of ZeRO-1/2 and ZeRO-3 look for."""
    # No settings in the groups: DeepSpeed would lay them over this run's, and at ZeRO-3 those of
    # the first group over all groups, weight decay and learning rate included.
    state = {
        "ds_version": ds_version,
        "dynamic_loss_scale": False,
        "overflow": False,
        "param_groups": [{} for _ in range(num_groups)],
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{}]},
    }
    torch.save(state, zero / "optimizer_state.pt")


def _write_counters(folder: Path, saved: Mapping[str, Any], world_size: int) -> None:
    """The file with the numbers of steps and samples, under the name that each stage looks for."""
    kept = ("global_steps", "global_samples", "skipped_steps", "dp_world_size", "mp_world_size")
    counters = {name: saved[name] for name in (*kept, "ds_version")}
    counters |= {"module": {}, "optimizer": None, "lr_scheduler": None}
    for old in folder.glob("*model_states.pt"):
        old.unlink()
    for name in (MODEL_STATES, *(f"zero_pp_rank_{n}_{MODEL_STATES}" for n in range(world_size))):
        torch.save(counters, folder / name)


def read_parameters(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Every parameter's values and step, for a loader without ZeRO."""
    return {
        name: {
            **{kind: _tensor(folder / "zero" / name / f"{kind}.pt") for kind in VALUES},
            "step": _read(folder / "zero" / name / "step.pt"),
        }
        for name in names
    }


def _step(common: Mapping[str, Any], parameter: Path) -> Tensor:
    if (parameter / "step.pt").exists():
        return _read(parameter / "step.pt")
    return common["optimizer_state_dict"]["state"][0]["step"]


def _tensor(path: Path) -> Tensor:
    value = _read(path)
    return value["param"] if isinstance(value, dict) else value


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)
