"""DeepSpeed, in one file: the engine as four verbs, and the state of all of it."""

from __future__ import annotations

import io
import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tvr.kernels.backends.cpu_build import build_lock
from tvr.trainer.config import TrainConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.deepspeed_config import deepspeed_config, is_fused
from tvr.trainer.engine.staging import Staging
from tvr.trainer.engine.universal import (
    MODEL_STATES,
    UniversalTarget,
    convert_stage_0,
    normalise,
    read_parameters,
    write_frozen_weights,
)
from tvr.trainer.errors import TrainingFailed
from tvr.trainer.model.model import Features, TextVideoModel, checkpoint_activations
from tvr.trainer.model.parameter_groups import parameter_groups

# The variable that names the folder in which torch.compile keeps what it made.
COMPILE_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


class Engine:
    """A model under ZeRO: `encode`, `backward`, `step`, and the state of all of it.

    Every method is collective: all ranks call it in the same order.
    """

    def __init__(
        self, model: TextVideoModel, train: TrainConfig, world: World, *, universal: bool = False
    ) -> None:
        """`universal`: the state that it will `load` is in the universal form."""
        on_gpu = world.device.type == "cuda"
        settings = deepspeed_config(train, world.world_size, universal=universal, pin_memory=on_gpu)
        _reject_scalars(model)
        deepspeed = _import_deepspeed(world)
        _change_towers(model, train)
        self._train = train
        self._universal = universal
        groups = parameter_groups(model, train)
        self._names = _names_in_order(model, groups)
        self._fused = is_fused(train, world.device.type)
        optimizer = torch.optim.AdamW(
            groups, betas=(train.beta1, train.beta2), fused=True if self._fused else None
        )
        if not deepspeed.comm.is_initialized():
            _build_extension(deepspeed)
            deepspeed.init_distributed(dist_backend=_backend(world), verbose=False)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model.to(world.device),
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )
        self._staging = Staging()
        self._engine.checkpoint_engine = self._staging
        # It would put scripts beside the checkpoints, while all ranks wait on that disk.
        self._engine._copy_recovery_script = lambda folder: None

    def encode(self, *inputs: Tensor) -> Features:
        """The model's forward; ZeRO-3 holds the parameters for its length only."""
        with explain_compile_cache_errors(self._train):
            return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients; over the micro-steps of a step they are averaged."""
        with explain_compile_cache_errors(self._train):
            self._engine.backward(loss)

    def step(self, learning_rate_factor: float) -> float | None:
        """Ends a micro-step; the last one of a step updates the weights.

        Returns the norm of the whole gradient before clipping, none where DeepSpeed has no step.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor
        at_boundary = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if at_boundary else None
        return None if norm is None else float(norm)

    def set_training(self, on: bool) -> None:
        """Dropout and TPM-CL on or off."""
        self._engine.train(on)

    @property
    def module(self) -> nn.Module:
        """The model itself; under ZeRO-3 its parameters are partitioned."""
        return self._engine.module

    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """This rank's part of weights and optimiser by file name, copied to host memory; without
        `copy`, as it lies there. No file is touched.

        A copy is valid until the next call, the other until the next step.
        """
        self._staging.copies = copy
        # DeepSpeed would move `latest` before all shards are written; saver.py does it after.
        self._engine.save_checkpoint("nowhere", tag="staged", save_latest=False)
        return self._staging.take()

    def load_checkpoint(self, folder: Path) -> None:
        """Restores weights and optimiser from a folder of what `stage` gave on as many ranks at
        the same stage, or of the universal form."""
        if self._universal and self._train.zero_stage == 0:
            self._load_without_zero(read_parameters(folder, self._names))
            return
        path, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:  # DeepSpeed reports a missing checkpoint this way and does not raise
            raise ValueError(f"{folder}: DeepSpeed found no checkpoint there")
        if self._universal:
            # ZeRO-3's loader gives all groups one tensor, which each of them would then count up.
            for parameter, state in self._optimizer.optimizer.state.items():
                state["step"] = self._placed_step(state["step"], parameter)

    def _load_without_zero(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        parameters = dict(self._engine.module.named_parameters())
        for name, kinds in values.items():
            parameter = parameters[name]
            parameter.data.copy_(kinds["fp32"])
            self._optimizer.state[parameter] = {
                kind: value.to(parameter.device)
                if kind != "step"
                else self._placed_step(value, parameter)
                for kind, value in kinds.items()
                if kind != "fp32"
            }

    def _placed_step(self, step: Tensor, parameter: Tensor) -> Tensor:
        """A copy of Adam's counter where it counts: beside the parameter for the fused one."""
        return step.to(parameter.device if self._fused else "cpu", copy=True)


def write_universal(shards: Path, folder: Path, zero_stage: int, reader: UniversalTarget) -> None:
    """Writes the universal form of a checkpoint's shards, saved at `zero_stage`, to `folder`."""
    folder.mkdir(parents=True)
    if reader.frozen:
        write_frozen_weights(folder, consolidated_weights(shards, zero_stage), reader)
    if zero_stage == 0:
        convert_stage_0(shards, folder, reader)
        return
    _import_deepspeed(None)
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(shards),
        output_folder=str(folder),
        # In this process: its pool would fork while gloo's threads run.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
    normalise(folder, reader)


def universal_target(model: TextVideoModel, train: TrainConfig, world_size: int) -> UniversalTarget:
    """What will load a universal checkpoint, before the model is partitioned."""
    groups = parameter_groups(model, train)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    names = _names_in_order(model, groups)
    return UniversalTarget(
        world_size=world_size,
        num_groups=len(groups),
        shapes={name: shapes[name] for name in names},
        frozen=frozenset(shapes.keys() - set(names)),
    )


def consolidated_weights(shards: Path, zero_stage: int) -> dict[str, Tensor]:
    """The whole fp32 state dict of a sharded checkpoint, on this process alone."""
    if zero_stage == 0:
        state = torch.load(shards / MODEL_STATES, weights_only=False)
        return state["module"]
    _import_deepspeed(None)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        state = get_fp32_state_dict_from_zero_checkpoint(str(shards.parent), tag=shards.name)
    if state is None:
        raise ValueError(f"{shards} holds no weights that DeepSpeed can join")
    if zero_stage == 3:
        return dict(state)
    # ZeRO-1 keeps frozen weights in the model's own state alone, where DeepSpeed does not look.
    saved = torch.load(shards / MODEL_STATES, weights_only=False)["module"]
    return {name: state[name] if name in state else saved[name].float() for name in saved}


def _names_in_order(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in groups for parameter in group["params"]]


def _import_deepspeed(world: World | None) -> Any:
    # Unset, DeepSpeed guesses, and on a machine without a GPU it warns on every rank.
    if world is None or world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # A process that no launcher started stands alone; DeepSpeed wants that said.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 still calls two collectives by the names that torch 2.13 deprecates.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", rf".*{name}. is deprecated", FutureWarning)
    return deepspeed


def _build_extension(deepspeed: Any) -> None:
    """What DeepSpeed would compile as it joins the ranks, on the first start ever. Who is killed at
    that leaves a lock for which every later start would wait."""
    builder = deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return  # it goes without, likewise
    from torch.utils import cpp_extension

    folder = cpp_extension._get_build_directory(builder.NAME, verbose=False)
    with build_lock(Path(folder)):
        builder.load(verbose=False)


def _backend(world: World) -> str:
    return "gloo" if world.device.type == "cpu" else "nccl"


def _change_towers(model: TextVideoModel, train: TrainConfig) -> None:
    """Activation checkpointing and compilation of the towers' layers, in place."""
    if train.activation_checkpointing:
        checkpoint_activations(model)
    for tower in (model.text_tower, model.image_tower):
        if train.compile:
            for layer in tower.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    # In place, so that names of parameters stay. All of a layer or an error: what
                    # torch could not compile would run uncompiled, and nobody would know.
                    layer.compile(fullgraph=True)


@contextmanager
def explain_compile_cache_errors(train: TrainConfig) -> Iterator[None]:
    """Tells what helps where a file in torch's cache of compiled code cannot be used.

    Raises:
        TrainingFailed: in place of torch's error, which is chained.
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        folder = os.environ.get(COMPILE_CACHE_VARIABLE)  # torch sets it where it is not set
        if not train.compile or folder is None or folder not in str(error):
            raise
        line = next(line for line in str(error).splitlines() if folder in line)
        raise TrainingFailed(
            f"train.compile: {line}. A process that is killed while it compiles leaves half a file"
            f" there, for good: remove {folder}"
        ) from error


def _reject_scalars(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise ValueError(
                f"parameter {name} has no dimension, which DeepSpeed cannot broadcast; "
                "give it shape (1,)"
            )
