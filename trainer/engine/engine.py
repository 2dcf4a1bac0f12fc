"""A model under DeepSpeed's ZeRO; the only module that imports deepspeed."""

from __future__ import annotations

import io
import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tvr.trainer.config import TrainConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.deepspeed_config import (
    deepspeed_config,
    has_own_optimizer,
    is_fused,
)
from tvr.trainer.engine.gradients import global_norm
from tvr.trainer.engine.partitioning import partition_model
from tvr.trainer.engine.staging import Staging
from tvr.trainer.engine.startup import build_extensions, import_muon, not_importable
from tvr.trainer.engine.tower_layers import explain_compile_cache_errors, wrap_tower_layers
from tvr.trainer.engine.universal import (
    UniversalTarget,
    complete,
    convert_stage_0,
    read_module,
    read_parameters,
    write_frozen_weights,
)
from tvr.trainer.model.model import Features, TextVideoModel
from tvr.trainer.model.parameter_groups import parameter_groups


class Engine:
    """A model under ZeRO: forward, backward, optimiser step, and saving and loading its state.

    Every method is collective: all ranks call it in the same order.
    """

    def __init__(
        self, model: TextVideoModel, train: TrainConfig, world: World, *, universal: bool = False
    ) -> None:
        """Partitions the model, in place.

        Args:
            model: At ZeRO-3 rank 0's values hold; other ranks may give `build_empty_model`.
            universal: `load_checkpoint` will read a universal checkpoint.

        Raises:
            ValueError: DeepSpeed does not support the settings, or a parameter of the model.
        """
        on_gpu = world.device.type == "cuda"
        settings = deepspeed_config(train, world.world_size, universal=universal, on_gpu=on_gpu)
        _reject_scalars(model)
        deepspeed = _import_deepspeed(world)
        wrap_tower_layers(model, train)
        self._train, self._world = train, world
        self._universal = universal
        groups = parameter_groups(model, train)
        self._names = _names_in_order(model, groups)
        self._fused = is_fused(train, world.device.type)
        optimizer = None
        if not has_own_optimizer(train):
            optimizer = torch.optim.AdamW(
                groups, betas=(train.beta1, train.beta2), fused=True if self._fused else None
            )
        build_extensions(deepspeed, train)
        import_muon(train)
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend=_backend(world), verbose=False)
        if train.zero_stage == 3:
            partition_model(model, deepspeed, settings, world)
        else:
            model.to(world.device)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=groups if optimizer is None else None,
            config=settings,
            dist_init_required=False,
        )
        for group in self._optimizer.param_groups:
            group.setdefault("peak", group["lr"])  # Muon splits the groups and drops our keys
        self._own_values = [_group_values(group) for group in self._optimizer.param_groups]
        self._staging = Staging()
        self._engine.checkpoint_engine = self._staging
        # DeepSpeed would copy a script beside the checkpoints while all ranks wait for that disk.
        self._engine._copy_recovery_script = lambda folder: None

    def encode(self, *inputs: Tensor) -> Features:
        """Runs the model's forward; ZeRO-3 gathers the parameters only while it runs."""
        with explain_compile_cache_errors(self._train):
            return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients; DeepSpeed averages them over micro-steps and over ranks."""
        with explain_compile_cache_errors(self._train):
            self._engine.backward(loss)

    def gradient_norm(self) -> Tensor | None:
        """Returns the norm of the step's whole gradient, before clipping and before the update.

        Returns:
            A 0-dim tensor on the device, equal on all ranks; NaN or infinite if any number of the
            gradient is, on any rank. None between updates: the micro-step is not the last one.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            return None
        return global_norm(self._engine, self._train.zero_stage, self._world)

    def step(self, learning_rate_factor: float) -> None:
        """Ends a micro-step; the last micro-step of a step updates the weights.

        Callers check `gradient_norm` first: DeepSpeed applies a gradient that is not finite at
        stage 0, and leaves the update out without an error at the others.

        Args:
            learning_rate_factor: Share of each parameter group's peak learning rate.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor
        self._engine.step()

    def non_finite_parameters(self) -> list[str]:
        """Returns the names of parameters whose reduced gradient is not finite, before `step`."""
        from deepspeed.utils import safe_get_full_grad

        names = []
        for name, parameter in self._engine.module.named_parameters():
            gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
            if gradient is not None and not gradient.isfinite().all():
                names.append(name)
        return names

    def set_training(self, on: bool) -> None:
        """Turns training mode (dropout and TPM-CL) on or off."""
        self._engine.train(on)

    @property
    def module(self) -> nn.Module:
        """The wrapped model; under ZeRO-3 its parameters are partitioned."""
        return self._engine.module

    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """Returns this rank's part of weights and optimiser, by file name; no file is written.

        Args:
            copy: Copies tensors to host memory, valid until the next call. Otherwise the tensors
                are the training's own, valid until the next step.
        """
        self._staging.copy = copy
        # The saver moves `latest` itself, after all shards are written; DeepSpeed would do it now.
        self._engine.save_checkpoint("nowhere", tag="staged", save_latest=False)
        files = self._staging.pop_files()
        for state in files.values():
            if isinstance(optimizer := state.get("optimizer_state_dict"), dict):
                # DeepSpeed's BF16_Optimizer omits the stage, which its own zero_to_fp32 reads.
                optimizer.setdefault("zero_stage", self._train.zero_stage)
        return files

    def load_checkpoint(self, folder: Path) -> None:
        """Loads weights and the optimiser's state, but no settings.

        Learning rates, weight decay, betas and clipping stay those that the engine was built with.

        Args:
            folder: Files that `state_dict` returned on as many ranks at the same ZeRO stage, or a
                universal checkpoint if the engine was built for one.

        Raises:
            ValueError: DeepSpeed finds no checkpoint in the folder.
        """
        if self._universal and self._train.zero_stage == 0:
            self._load_stage_0(read_parameters(folder, self._names))
            return
        with redirect_stdout(io.StringIO()):  # BF16_Optimizer prints a line for debugging
            path, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:  # DeepSpeed does not raise for a missing checkpoint
            raise ValueError(f"{folder}: DeepSpeed found no checkpoint there")
        # The state of an optimiser brings the settings of the run that saved it.
        for group, values in zip(self._optimizer.param_groups, self._own_values, strict=True):
            group.update(values)
        if hasattr(self._optimizer, "clip_grad"):
            self._optimizer.clip_grad = self._train.gradient_clip
        if self._universal:
            # ZeRO-3's loader shares one step tensor between groups, and each group would count it.
            for parameter, state in self._optimizer.optimizer.state.items():
                state["step"] = self._copy_step(state["step"], parameter)

    def _load_stage_0(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        parameters = dict(self._engine.module.named_parameters())
        for name, kinds in values.items():
            parameter = parameters[name]
            parameter.data.copy_(kinds["fp32"])
            self._optimizer.state[parameter] = {
                kind: value.to(parameter.device)
                if kind != "step"
                else self._copy_step(value, parameter)
                for kind, value in kinds.items()
                if kind != "fp32"
            }

    def _copy_step(self, step: Tensor, parameter: Tensor) -> Tensor:
        """Copies Adam's step counter to the device where AdamW keeps it."""
        return step.to(parameter.device if self._fused else "cpu", copy=True)


def write_universal(
    shards: Path, folder: Path, zero_stage: int, target: UniversalTarget, *, workers: int = 1
) -> None:
    """Converts a checkpoint into a universal one; `conversion.convert` chooses the workers.

    Args:
        shards: Folder with the files of all ranks, as `Engine.state_dict` named them.
        folder: Folder to make.
        zero_stage: ZeRO stage at which the shards were saved.
        target: The job that will load the result.
        workers: Processes that convert. More than one are forked, so this process must have no
            other threads: it must not have joined the ranks of a job.
    """
    folder.mkdir(parents=True)
    if target.frozen:
        write_frozen_weights(folder, consolidated_weights(shards, zero_stage), target)
    if zero_stage == 0:
        convert_stage_0(shards, folder, target, workers)
        return
    _import_deepspeed(None)
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(shards),
        output_folder=str(folder),
        num_extract_workers=workers,
        num_merge_workers=workers,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
    complete(folder, target, workers)


def universal_target(
    model: TextVideoModel, train: TrainConfig, world_size: int, saved: TrainConfig | None = None
) -> UniversalTarget:
    """Describes the job that will load a universal checkpoint, from its unpartitioned model.

    Args:
        saved: Settings with the learning rates of the checkpoint; None: those of `train`.

    Raises:
        ValueError: the optimiser is DeepSpeed's own, whose state has another form.
    """
    if has_own_optimizer(train):
        raise ValueError(
            "train.deepspeed names an optimiser. Its checkpoints load only on the same number of"
            " ranks, at the same train.zero_stage, precision and layer_decay; resume with these"
        )
    groups = parameter_groups(model, train)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    names = _names_in_order(model, groups)
    return UniversalTarget(
        world_size=world_size,
        num_groups=len(groups),
        shapes={name: shapes[name] for name in names},
        frozen=frozenset(shapes.keys() - set(names)),
        saved_names=tuple(_names_in_order(model, parameter_groups(model, saved or train))),
    )


def consolidated_weights(shards: Path, zero_stage: int) -> dict[str, Tensor]:
    """Reads the whole fp32 state dict of a sharded checkpoint, in this process alone.

    Args:
        shards: Folder with at least the files of which `holds_weights` is true.
        zero_stage: ZeRO stage at which the shards were saved.

    Raises:
        ValueError: DeepSpeed cannot join the shards.
    """
    saved = read_module(shards) if zero_stage < 3 else {}
    # ZeRO-1/2 copies its float32 weights to the model after each update: in fp32 both are equal.
    if zero_stage < 3 and all(v.dtype != torch.bfloat16 for v in saved.values()):
        return saved
    _import_deepspeed(None)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        state = get_fp32_state_dict_from_zero_checkpoint(str(shards.parent), tag=shards.name)
    if state is None:
        raise ValueError(f"{shards}: DeepSpeed cannot join the weights of these shards")
    if zero_stage == 3:
        return dict(state)
    # ZeRO-1 keeps frozen weights only in the model's own state, which DeepSpeed does not read.
    return {name: state[name] if name in state else saved[name].float() for name in saved}


def _group_values(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group, without its parameters."""
    return {name: value for name, value in group.items() if name != "params"}


def _names_in_order(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in groups for parameter in group["params"]]


def _import_deepspeed(world: World | None) -> Any:
    # Without the variable, DeepSpeed guesses, and warns on every rank of a machine without a GPU.
    on_gpu = torch.cuda.is_available() if world is None else world.device.type == "cuda"
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed requires the variable even in a process that no launcher started.
    os.environ.setdefault("LOCAL_RANK", "0")
    if world is not None and world.device.type == "cuda":
        # It takes it for the number of the GPU, and insists that Open MPI's says the same.
        for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
            if name in os.environ:
                os.environ[name] = str(world.device.index)
    with not_importable("mlflow"):
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls two collectives by names that torch 2.13 deprecates.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", rf".*{name}. is deprecated", FutureWarning)
    return deepspeed


def _backend(world: World) -> str:
    return "gloo" if world.device.type == "cpu" else "nccl"


def _reject_scalars(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise ValueError(
                f"parameter {name} has no dimension, so DeepSpeed cannot broadcast it; "
                "give it shape (1,)"
            )
