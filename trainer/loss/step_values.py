"""Numbers of a step that stay on the device until the host reads all of them at once.

The host's read waits for all the work queued before, so a step has a single one: after its last
backward and before its update, which must not happen if one of the numbers is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tvr.kernels.device_transfer import to_host
from tvr.trainer.distributed.collectives import all_gather_rows
from tvr.trainer.distributed.world import World


@dataclass(frozen=True, slots=True)
class NonFiniteTerms:
    """A loss with terms that are not finite."""

    ranks: list[int]
    """Ranks with such a share, in order; the same on every rank."""
    keys: list[str]
    """Sample keys of this rank's part of the loss."""


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """What the host has read of a step."""

    terms: list[float]
    """Means over the step's losses of the values of the global batch."""
    gradient_norm: float
    non_finite: NonFiniteTerms | None
    """The first loss that is not finite."""


class StepValues:
    """Collects the terms of a step's losses on the device."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rows: list[Tensor] = []
        self._keys: list[list[str]] = []

    def add(self, shares: Tensor, keys: list[str]) -> None:
        """Adds a loss; all ranks call it.

        Args:
            shares: (terms,) this rank's shares of the terms, on the device.
            keys: Sample keys of this rank's part of the loss.
        """
        ranks = self._world.world_size
        self._rows.append(all_gather_rows(shares[None], self._world, (1,) * ranks))
        self._keys.append(keys)

    def read(self, gradient_norm: Tensor) -> StepNumbers:
        """Reads all losses and the norm: the one host synchronisation of a step.

        Args:
            gradient_norm: 0-dim, on the device.
        """
        rows = torch.stack(self._rows)
        numbers = torch.cat([rows.flatten(), gradient_norm.reshape(1).to(rows)])
        numbers = to_host(numbers, "step")
        self._world.wait_points.synchronised()
        rows = numbers[:-1].view(rows.shape)
        terms = torch.zeros(rows.shape[2])
        for of_ranks in rows:
            terms += of_ranks.sum(0) / len(rows)
        (norm,) = numbers[-1:].tolist()
        is_finite = rows.isfinite().all(2).tolist()
        return StepNumbers(terms.tolist(), norm, self._first_non_finite(is_finite))

    def _first_non_finite(self, is_finite: Sequence[Sequence[bool]]) -> NonFiniteTerms | None:
        for by_rank, keys in zip(is_finite, self._keys, strict=True):
            ranks = [rank for rank, finite in enumerate(by_rank) if not finite]
            if ranks:
                return NonFiniteTerms(ranks, keys)
        return None
