"""Which pairs of a step got a gradient that is not finite at their features.

The flags stay on the device, so that recording them waits for nothing. Only a step that fails
reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tvr.trainer.model.model import Features


class PairGradients:
    """Records, for the pairs of one step, whether the gradient at their features is finite."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        """Keys of all recorded pairs, in order."""
        self._finite: list[Tensor] = []

    def watch(self, features: Features) -> None:
        """Keeps the features' gradients in the coming backward, for `record`."""
        for x in _differentiable(features):
            x.retain_grad()

    def record(self, features: Features, keys: Sequence[str]) -> None:
        """Records the pairs of a finished backward.

        Args:
            features: Watched features, or leaves; row n belongs to `keys[n]`.
        """
        gradients = [x.grad for x in _differentiable(features) if x.grad is not None]
        if gradients:
            rows = [g.isfinite().reshape(len(g), -1).all(1) for g in gradients]
            self.keys += keys
            self._finite.append(torch.stack(rows).all(0))

    def non_finite_keys(self) -> list[str]:
        """Returns the keys of this rank's pairs whose gradient is not finite; reads the device."""
        finite = torch.cat(self._finite).tolist() if self._finite else []
        return [key for key, is_finite in zip(self.keys, finite, strict=True) if not is_finite]


def _differentiable(features: Features) -> Iterator[Tensor]:
    return (x for x in features if x is not None and x.requires_grad)
