"""Memory of a configured model on one rank, measured without allocating it.

The model is built on torch's meta device, where tensors have shapes but no memory, so that a model
larger than this machine can be measured.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tvr.trainer.config import Config, TrainConfig
from tvr.trainer.engine.deepspeed_config import whole_gradient_bytes
from tvr.trainer.model.features import stored_inputs
from tvr.trainer.model.model import (
    TextVideoModel,
    build_meta_model,
    checkpoint_activations,
    image_size,
)
from tvr.trainer.model.parameter_groups import parameter_groups
from tvr.trainer.model.tokenizer import Tokenizer

FP32, BF16 = 4, 2
ADAM_MOMENTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBytes:
    """Memory of a model on each rank in bytes, without DeepSpeed's own buffers."""

    weights: int
    gradients: int
    optimiser: int
    """AdamW's two moments, and the float32 weights if ZeRO keeps a copy."""
    activations: int
    """Peak of forward and backward of one micro-batch, without TPM-CL."""
    staged: tuple[int, ...]
    """Each tensor of which a background checkpoint holds a copy in host memory."""

    @property
    def states(self) -> int:
        """Bytes that exist between steps."""
        return self.weights + self.gradients + self.optimiser


def model_bytes(config: Config, tokenizer: Tokenizer, ranks: int) -> ModelBytes:
    """Memory of the configured model on one rank of `ranks`."""
    train = config.train
    model = build_meta_model(
        config.model, config.loss, tokenizer, num_frames=config.data.num_frames
    )
    whole = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    number, stage = _bytes_per_number(train), train.zero_stage
    optimiser = FP32 * (ADAM_MOMENTS + _has_master(train))
    return ModelBytes(
        weights=number * whole // (ranks if stage == 3 else 1),
        gradients=whole_gradient_bytes(train) * trained // (ranks if stage >= 2 else 1),
        optimiser=optimiser * trained // (ranks if stage >= 1 else 1),
        activations=activation_bytes(config, tokenizer),
        staged=tuple(staged_tensor_bytes(model, train, ranks)),
    )


def staged_tensor_bytes(model: TextVideoModel, train: TrainConfig, ranks: int) -> Iterator[int]:
    """Yields the bytes of each tensor that one rank saves; small counters are left out."""
    stage = train.zero_stage
    for parameter in model.parameters():
        # At stage 3 the partitioned float32 weights are the only copy that is saved.
        if stage < 3:
            yield _bytes_per_number(train) * parameter.numel()
        elif not parameter.requires_grad:
            yield _bytes_per_number(train) * -(-parameter.numel() // ranks)
        if stage == 0 and parameter.requires_grad:
            yield from [FP32 * parameter.numel()] * ADAM_MOMENTS
    if stage > 0:
        # ZeRO flattens each parameter group, and each rank keeps an equal part of it.
        for group in parameter_groups(model, train):
            members = cast(list[Tensor], group["params"])
            numel = sum(parameter.numel() for parameter in members)
            yield from [FP32 * -(-numel // ranks)] * (ADAM_MOMENTS + _has_master(train))


def activation_bytes(config: Config, tokenizer: Tokenizer) -> int:
    """Peak bytes that forward and backward of one micro-batch allocate, without gradients.

    Attention scores are counted although fused attention does not keep them, so the result is too
    high for many patches. TPM-CL is left out: it is small beside the towers, and it depends on
    values, which the meta device does not have.
    """
    loss = replace(config.loss, tpm_cl=0)
    model = build_meta_model(config.model, loss, tokenizer, num_frames=config.data.num_frames)
    if config.train.activation_checkpointing:
        checkpoint_activations(model)
    if config.train.precision == "bf16":
        model = model.to(torch.bfloat16)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    pairs, frames, words = config.train.micro_batch, config.data.num_frames, tokenizer.max_words
    side = image_size(config.model)
    with torch.device("meta"):
        inputs = (
            torch.zeros(pairs, frames, 3, side, side, dtype=torch.uint8),
            torch.ones(pairs, frames, dtype=torch.int64),
            torch.zeros(pairs, words, dtype=torch.int64),
            torch.ones(pairs, words, dtype=torch.int64),
        )
    if config.data.features is not None:
        inputs = stored_inputs(model, *inputs)
    with AllocationTracker([*model.parameters(), *inputs]) as tracker:
        features = model(*inputs)
        forward = tracker.peak
        total = torch.stack([x.float().sum() for x in features if x is not None and x.grad_fn])
        total.sum().backward()
    # Gradients appear while activations are freed: either end of the backward can be the peak.
    return max(forward, tracker.peak - gradients)


def checkpoint_bytes(model: TextVideoModel, train: TrainConfig) -> int:
    """Bytes of all ranks' files of one checkpoint, without random states and manifest."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # At stage 3 the partitioned float32 weights are the only copy that is saved.
    weights = 0 if train.zero_stage == 3 else _bytes_per_number(train) * whole
    return weights + FP32 * (ADAM_MOMENTS + _has_master(train)) * trained


def _bytes_per_number(train: TrainConfig) -> int:
    return BF16 if train.precision == "bf16" else FP32


def _has_master(train: TrainConfig) -> bool:
    """Whether ZeRO keeps a float32 copy of the weights."""
    return train.zero_stage >= 1


class AllocationTracker(TorchDispatchMode):
    """Tracks the bytes that operations allocate; `peak` is their maximum so far."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        """Storages of `existing` tensors, and of views of them, are not counted."""
        super().__init__()
        self._allocated = self.peak = 0
        self._known = {id(s): weakref.ref(s) for s in (t.untyped_storage() for t in existing)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # checks of masks pass: meta tensors have no values
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        known = self._known.get(key)
        if known is not None and known() is storage:
            return

        def on_free(_: Any) -> None:
            del self._known[key]
            self._allocated -= size

        self._known[key] = weakref.ref(storage, on_free)
        self._allocated += size
        self.peak = max(self.peak, self._allocated)
