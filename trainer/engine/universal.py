"""Universal checkpoints: one format that every number of ranks and every ZeRO stage can load.

DeepSpeed's universal checkpoint holds a folder for each parameter, with its float32 value and the
two moments of Adam. The output of DeepSpeed's converter loads only at the stage that it came from:
ZeRO-3 loses shapes and steps, ZeRO-1/2 lacks files that ZeRO-3 needs, and stage 0 has no converter.
This module completes it, so that the result loads at every stage:

    zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt     each trained parameter
    frozen.pt                                       values of frozen parameters by name, if any
    zero/optimizer_state.pt                         settings and step of the optimiser
    mp_rank_00_model_states.pt, zero_pp_rank_R_mp_rank_00_model_states.pt    step counters
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tvr.launchers.process import end_with_parent

VALUES = ("fp32", "exp_avg", "exp_avg_sq")
MODEL_STATES = "mp_rank_00_model_states.pt"
FROZEN = "frozen.pt"
# Ends of the names of DeepSpeed's files: a rank's part of the model, and of the optimiser.
ALL_STATES = ("_model_states.pt", "_optim_states.pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class UniversalTarget:
    """The job that will load a universal checkpoint."""

    world_size: int
    num_groups: int
    """Parameter groups in the optimiser."""
    shapes: Mapping[str, torch.Size]
    """Shapes of the trained parameters by name, in the optimiser's order."""
    frozen: frozenset[str] = frozenset()
    """Names of the frozen parameters."""
    saved_names: tuple[str, ...] = ()
    """Names in the order of the optimiser that saved the state; (): that of `shapes`."""


def holds_weights(name: str, zero_stage: int, precision: str) -> bool:
    """True if `engine.consolidated_weights` reads this file of a checkpoint.

    At stage 0, and at stages 1 and 2 in fp32, the model's own file has the float32 weights (at
    stage 0 the moments, too). At stages 1 and 2 in bf16, and at stage 3, they lie in the ranks'
    optimiser files, beside the moments.

    Args:
        name: Name of one of DeepSpeed's files, without a folder.
        zero_stage: ZeRO stage at which the checkpoint was saved.
        precision: Layout of its states, as `deepspeed_config.state_layout` names it.
    """
    in_optimiser_files = zero_stage == 3 or (zero_stage > 0 and precision != "fp32")
    return name.endswith(ALL_STATES) if in_optimiser_files else name == MODEL_STATES


def read_module(shards: Path) -> dict[str, Tensor]:
    """Maps the model's state dict of a checkpoint that was saved at ZeRO stages 0 to 2.

    At stage 0 the file holds the moments, too, which are then not read from disk.
    """
    return _read(shards / MODEL_STATES, mmap=True)["module"]


def complete(folder: Path, target: UniversalTarget, workers: int = 1) -> None:
    """Completes the output of DeepSpeed's converter in `folder`, in place.

    Args:
        workers: Processes that rewrite the parameters' files; more than one are forked.
    """
    zero = folder / "zero"
    common = _read(zero / "optimizer_state.pt")
    step = _step(common, zero / next(iter(target.shapes)))
    _share_out(partial(_complete_parameters, zero, target, step), list(target.shapes), workers)
    counters = _read(sorted(folder.glob("*model_states.pt"))[0])
    _write_common(zero, step, counters["ds_version"], target.num_groups)
    _write_counters(folder, counters, target.world_size)


def convert_stage_0(shards: Path, folder: Path, target: UniversalTarget, workers: int = 1) -> None:
    """Converts the shards of a checkpoint that was saved at ZeRO stage 0.

    Args:
        workers: Processes that write the parameters' files; more than one are forked.
    """
    saved = _read(shards / MODEL_STATES, mmap=True)
    step = next(iter(saved["optimizer"]["state"].values()))["step"]
    _share_out(partial(_convert_parameters, shards, folder, target), list(target.shapes), workers)
    _write_common(folder / "zero", step, saved["ds_version"], target.num_groups)
    _write_counters(folder, saved, target.world_size)


def write_frozen_weights(
    folder: Path, weights: Mapping[str, Tensor], target: UniversalTarget
) -> None:
    """Writes the frozen weights, which no optimiser holds, for `load_frozen_weights`."""
    torch.save({name: weights[name].clone() for name in target.frozen}, folder / FROZEN)


def load_frozen_weights(model: nn.Module, folder: Path) -> None:
    """Loads the frozen weights of a universal checkpoint into a model that is not partitioned."""
    if (folder / FROZEN).exists():
        model.load_state_dict(_read(folder / FROZEN), strict=False)


def _share_out(work: Callable[[Sequence[str]], None], names: list[str], workers: int) -> None:
    """Calls `work` with all names, in this process or with equal shares of them in several."""
    if workers == 1:
        work(names)
        return
    with ProcessPoolExecutor(workers, initializer=end_with_parent, initargs=(os.getpid(),)) as pool:
        list(pool.map(work, [names[first::workers] for first in range(workers)]))


def _complete_parameters(
    zero: Path, target: UniversalTarget, step: Tensor, names: Sequence[str]
) -> None:
    for name in names:
        values = {kind: _tensor(zero / name / f"{kind}.pt") for kind in VALUES}
        shaped = {kind: value.reshape(target.shapes[name]) for kind, value in values.items()}
        _write_parameter(zero / name, shaped, step)


def _convert_parameters(
    shards: Path, folder: Path, target: UniversalTarget, names: Sequence[str]
) -> None:
    saved = _read(shards / MODEL_STATES, mmap=True)
    moments = saved["optimizer"]["state"]
    step = next(iter(moments.values()))["step"]
    order = target.saved_names or tuple(target.shapes)
    positions = {name: position for position, name in enumerate(order)}
    for name in names:
        values = {"fp32": saved["module"][name].float()}
        values |= {kind: moments[positions[name]][kind] for kind in VALUES[1:]}
        _write_parameter(folder / "zero" / name, values, step)


def _write_parameter(folder: Path, values: Mapping[str, Tensor], step: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, value in values.items():
        torch.save({"param": value.detach().clone(), "cat_dim": 0}, folder / f"{kind}.pt")
    torch.save(step, folder / "step.pt")


def _write_common(zero: Path, step: Tensor, ds_version: str, num_groups: int) -> None:
    """Writes the optimiser's common state, which the loaders of ZeRO-1/2 and ZeRO-3 read."""
    # The groups hold no settings: DeepSpeed would replace this run's learning rates and weight
    # decays by them, and ZeRO-3 would give those of the first group to all groups.
    state = {
        "ds_version": ds_version,
        "dynamic_loss_scale": False,
        "overflow": False,
        "param_groups": [{} for _ in range(num_groups)],
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{}]},
    }
    torch.save(state, zero / "optimizer_state.pt")


def _write_counters(folder: Path, saved: Mapping[str, Any], world_size: int) -> None:
    """Writes the counters of steps and samples under the file names that each stage reads."""
    kept = ("global_steps", "global_samples", "skipped_steps", "dp_world_size", "mp_world_size")
    counters = {name: saved[name] for name in (*kept, "ds_version")}
    counters |= {"module": {}, "optimizer": None, "lr_scheduler": None}
    for old in folder.glob("*model_states.pt"):
        old.unlink()
    for name in (MODEL_STATES, *(f"zero_pp_rank_{n}_{MODEL_STATES}" for n in range(world_size))):
        torch.save(counters, folder / name)


def read_parameters(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Reads every parameter's value, moments and step, for ZeRO stage 0."""
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


def _read(path: Path, *, mmap: bool = False) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap)
