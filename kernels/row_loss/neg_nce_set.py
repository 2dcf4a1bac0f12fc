"""One direction of NegNCE in `set` mode: one penalty on the whole hard set of a row."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from tvr.kernels.row_loss.direction import DirectionShape
from tvr.kernels.row_loss.info_nce import InfoNceDirection
from tvr.kernels.row_loss.loss_rule import LossRule
from tvr.kernels.row_loss.online_softmax import (
    Collectives,
    TilePosition,
    logsumexp_over_ranks,
)


class SetNegNceDirection(InfoNceDirection):
    """Mean of -log P_ii - weight x log(1 - P(H_i)), with P(H_i) = sum over H_i of P.

    H_i are the hard negatives of row (or column) i. With h the log-sum-exp of the logits in H_i and
    s that of all others, the positive among them, -log(1 - P(H_i)) = log(1 + e^(h - s)): exact
    where P(H_i) rounds to 1 or to 0. Its gradient with respect to a logit l is P inside H_i, and
    -P(H_i) e^(l - s) outside. So the penalty is weight x P(H_i), whatever the number of negatives
    that share this mass.
    """

    uses_hard_negatives: ClassVar[bool] = True

    def __init__(self, rule: LossRule, shape: DirectionShape, like: Tensor) -> None:
        super().__init__(rule, shape, like)
        # Log-sum-exp of the logits in H_i and of all others.
        self.hard, self.others = like.new_full((2, shape.size), -torch.inf)

    def add_hard_negatives(
        self, logits: Float[Tensor, "n m"], hard: Bool[Tensor, "n m"], position: TilePosition
    ) -> None:
        """Adds a tile's log-sum-exp inside and outside H_i."""
        super().add_hard_negatives(logits, hard, position)
        logits = self.weighted(logits, position)
        for statistic, left_out in ((self.hard, ~hard), (self.others, hard)):
            of_tile = logits.masked_fill(left_out, -torch.inf)
            of_tile = of_tile.logsumexp(self.shape.dim, keepdim=True)
            sums = self.broadcast(statistic, position, logits)
            torch.logaddexp(sums, of_tile, out=sums)

    def finish_hard_negatives(self, collectives: Collectives) -> None:
        """Merges column statistics over ranks."""
        if self.shape.dim == 0:
            both = torch.stack([self.hard, self.others])
            self.hard, self.others = logsumexp_over_ranks(both, collectives)

    def penalty_share(self) -> Tensor:
        """weight x -log(1 - P(H_i)) of this rank's own rows (columns), divided by G."""
        own = self.shape.own
        penalty = -functional.logsigmoid(self.others[own] - self.hard[own])
        return self.rule.weight / self.shape.num_pairs * penalty.sum()

    def gradient(
        self,
        logits: Float[Tensor, "n m"],
        hard: Bool[Tensor, "n m"] | None,
        position: TilePosition,
    ) -> Float[Tensor, "n m"]:
        """InfoNCE's gradient and that of the penalty."""
        assert hard is not None
        logits = self.weighted(logits, position)
        probability = self.probability(logits, position)
        of_set = self.broadcast((self.hard - self.others).sigmoid(), position, logits)
        push = (logits - self.broadcast(self.others, position, logits)).exp_().mul_(-of_set)
        push = torch.where(hard, probability, push)
        push.mul_(self.rule.weight / self.shape.num_pairs)
        return self.of_positives(probability, self.positive_weight(), position).add_(push)
