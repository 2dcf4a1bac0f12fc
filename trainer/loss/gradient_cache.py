"""Gradient caching: the loss of a batch whose features fit in memory, but not its activations.

    1  encode every micro-batch without graph        the features of all, as leaves
    2  loss of all features, backward                the gradient of every feature
    3  encode every micro-batch again, with graph    backward of sum(feature x its gradient)

The second encoding replays the random state of the first, so dropout drops the same units. The
result is the gradient of the whole batch's loss, while only one micro-batch at a time has
activations (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from tvr.trainer.model.model import Features

T = TypeVar("T")
Encode = Callable[[T], Features]


class FeatureCache(Generic[T]):
    """Features of several micro-batches, and the state that a second encoding needs.

    Args:
        encode: Must depend on its input, the parameters and torch's random state alone. The
            parameters must not change before `replay`.
        micro_batches: May differ in size.
        device: Device whose random state is replayed beside the CPU's.

    Raises:
        ValueError: there are no micro-batches.
    """

    def __init__(self, encode: Encode[T], micro_batches: Sequence[T], device: torch.device) -> None:
        if not micro_batches:
            raise ValueError("there are no micro-batches to encode; give at least one")
        self._encode, self._micro_batches, self._device = encode, micro_batches, device
        self._states: list[list[Tensor]] = []
        parts = []
        for micro_batch in micro_batches:
            self._states.append(_random_state(device))
            with torch.no_grad():
                parts.append(encode(micro_batch))
        self._sizes = [len(part.word_mask) for part in parts]
        self.features = _leaves(concat_features(parts))
        """Features of all micro-batches in order: leaves that collect the gradient of a loss."""

    def replay(self, backward: Callable[[Tensor], None]) -> None:
        """Encodes each micro-batch again with graph, and calls `backward` with a scalar for it.

        The gradients of the scalars SUM to the gradient of the loss of `features`; the values of
        the scalars mean nothing. The random state is restored afterwards.

        Raises:
            ValueError: the loss of `features` has had no backward.
        """
        columns = [None if leaf is None else leaf.grad for leaf in self.features]
        if all(column is None for column in columns):
            raise ValueError("replay needs the features' gradients: call the loss's backward first")
        split = [
            [None] * len(self._sizes) if column is None else column.split(self._sizes)
            for column in columns
        ]
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            for micro_batch, state, *gradients in zip(
                self._micro_batches, self._states, *split, strict=True
            ):
                _set_random_state(state, self._device)
                backward(_inner_product(self._encode(micro_batch), gradients))


def concat_features(parts: Sequence[Features]) -> Features:
    """Concatenates the features of several batches along the batch dimension."""
    columns: list[Any] = [
        None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
    ]
    return Features(*columns)


def _leaves(features: Features) -> Features:
    tensors: list[Any] = [
        x.requires_grad_() if x is not None and x.is_floating_point() else x for x in features
    ]
    return Features(*tensors)


def _inner_product(features: Features, gradients: Sequence[Tensor | None]) -> Tensor:
    """sum(feature x gradient); its gradient at the features is `gradients`, in their dtype."""
    products = [
        # Summed in float32 at least: a bfloat16 scalar would round a factor such as 1/3 too much.
        (x * gradient).sum(dtype=torch.promote_types(x.dtype, torch.float32))
        for x, gradient in zip(features, gradients, strict=True)
        if x is not None and gradient is not None
    ]
    return torch.stack(products).sum()


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
