"""A configured model without its numbers: how many parameters, and what they take on a rank.

Built on torch's meta device, where tensors have shapes and no memory, so that a model that fits no
machine at hand is measured as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tvr.trainer.config import Config, TrainConfig
from tvr.trainer.model.model import (
    TextVideoModel,
    build_meta_model,
    checkpoint_activations,
    image_size,
)
from tvr.trainer.model.tokenizer import Tokenizer

FP32, BF16 = 4, 2
MOMENTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBytes:
    """What a model takes on each rank, in bytes; DeepSpeed's own buffers are not counted."""

    weights: int
    gradients: int
    optimiser: int
    """AdamW's two moments, and the float32 weights where ZeRO keeps them apart."""
    activations: int
    """The most that is alive in forward and backward of one micro-batch, without TPM-CL."""

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.optimiser


def model_bytes(config: Config, tokenizer: Tokenizer, ranks: int) -> ModelBytes:
    """What the configured model takes on one rank of `ranks`."""
    train = config.train
    model = build_meta_model(
        config.model, config.loss, tokenizer, num_frames=config.data.num_frames
    )
    whole = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    number, stage = _bytes_per_number(train), train.zero_stage
    apart = FP32 * (MOMENTS + _has_master(train))
    return ModelBytes(
        weights=number * whole // (ranks if stage == 3 else 1),
        gradients=number * trained // (ranks if stage >= 2 else 1),
        optimiser=apart * trained // (ranks if stage >= 1 else 1),
        activations=activation_bytes(config, tokenizer),
    )


def activation_bytes(config: Config, tokenizer: Tokenizer) -> int:
    """The peak of what forward and backward of one micro-batch allocate, gradients apart.

    Attention scores count as held, which fused attention does not hold: for many patches the
    figure is high. TPM-CL is left out: its pieces are small beside the towers, and it looks at
    values.
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
    with AliveBytes(model.parameters()) as alive:
        features = model(*inputs)
        forward = alive.peak
        total = torch.stack([x.float().sum() for x in features if x is not None and x.grad_fn])
        total.sum().backward()
    # Gradients come as activations go: the peak is one or the other's.
    return max(forward, alive.peak - gradients)


def checkpoint_bytes(model: TextVideoModel, train: TrainConfig) -> int:
    """All ranks' files of one checkpoint, without random states and manifest."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # At stage 3 a rank's part of the float32 weights is all that there is of them.
    weights = 0 if train.zero_stage == 3 else _bytes_per_number(train) * whole
    return weights + FP32 * (MOMENTS + _has_master(train)) * trained


def _bytes_per_number(train: TrainConfig) -> int:
    return BF16 if train.precision == "bf16" else FP32


def _has_master(train: TrainConfig) -> bool:
    """Whether ZeRO keeps float32 weights beside the model's."""
    return train.zero_stage >= 1


class AliveBytes(TorchDispatchMode):
    """Adds up the bytes of what operations allocate, until it is let go of."""

    def __init__(self, there_before: Iterable[Tensor]) -> None:
        super().__init__()
        self._now = self.peak = 0
        # Views of parameters come out of operations, too.
        self._known = {id(s): weakref.ref(s) for s in (t.untyped_storage() for t in there_before)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # a check of masks, which have no values here, finds nothing
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf.untyped_storage())
        return result

    def _meet(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        known = self._known.get(key)
        if known is not None and known() is storage:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self._now -= size

        self._known[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)
