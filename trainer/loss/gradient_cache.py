"""Gradient caching: the loss of a batch whose features fit, but not the encoders' activations.

    1  encode every micro-batch without graph           features of all, as leaves
    2  loss of all features, backward                   gradient of every feature
    3  encode every micro-batch again, with graph       backward of sum(feature x its gradient)

The second encoding sees the random state of the first, so dropout drops the same. What comes out is
the gradient of the whole batch's loss; activations are alive for one micro-batch at a time. (Gao et
al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021.)
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
    """Features of several micro-batches, with what it takes to compute them once more.

    Micro-batches may differ in size. `encode` must depend on its input, the parameters and torch's
    random state alone, and the parameters must not change until `replay`.
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
        self.features = _leaves(joined(parts))
        """Those of all micro-batches in order: leaves that collect the gradient of a loss."""

    def replay(self, backward: Callable[[Tensor], None]) -> None:
        """Hands `backward` a scalar for each micro-batch, in order, encoded anew with its graph.

        The scalars' gradients SUM to that of whatever loss `features` were differentiated for;
        their values mean nothing. The random state is left as it was found.

        Raises:
            ValueError: no loss of `features` was differentiated.
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


def joined(parts: Sequence[Features]) -> Features:
    """The features of several batches as those of one."""
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
    """sum(feature x gradient): its gradient at the features is `gradients`, in their own dtype."""
    products = [
        # Summed in float32 at least: a bfloat16 scalar could not carry a factor such as 1/3 exactly
        # enough through the backward.
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
