"""One direction of NegNCE in `reference` and in `log` mode: a penalty on each hard negative.

With P the softmax of a row (or column) i, H_i its hard negatives, c_i the weight of its penalty and
U_i = sum over H_i of P / (1 - P), the gradient of -log P_ii + c_i sum over H_i of -log(1 - P) with
respect to a logit is

    P - [matched] - c_i U_i P + [hard] c_i P / (1 - P)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvr.kernels.row_loss.direction import DirectionShape
from tvr.kernels.row_loss.info_nce import InfoNceDirection
from tvr.kernels.row_loss.loss_rule import LossRule
from tvr.kernels.row_loss.online_softmax import Collectives, TilePosition

MIN_PROBABILITY = 1e-6  # clamp of P and of 1 - P in `reference` mode
DOMINANT = 0.75  # above one half, so that at most one entry of a softmax is dominant


class ReferenceNegNceDirection(InfoNceDirection):
    """Mean of -log P_ii and weight x mean over all of H of -log(1 - P), with P clamped."""

    uses_hard_negatives: ClassVar[bool] = True

    def __init__(self, rule: LossRule, shape: DirectionShape, like: Tensor) -> None:
        super().__init__(rule, shape, like)
        # Sums over the hard negatives of a row of -log(1 - P) and of P / (1 - P).
        self.penalty, self.odds = like.new_zeros(2, shape.size)
        self.penalty_weight = like.new_zeros(shape.size)
        self.unclamped = like.new_ones(shape.size)  # 0 where the clamp removes the gradient

    def finish_negatives(self, positives: Tensor, collectives: Collectives) -> None:
        """Also finds the positives that the clamp leaves a gradient."""
        super().finish_negatives(positives, collectives)
        self.unclamped = _within_clamp((positives - self.total).exp()).to(positives.dtype)

    def add_hard_negatives(
        self, logits: Float[Tensor, "n m"], hard: Bool[Tensor, "n m"], position: TilePosition
    ) -> None:
        """Adds a tile's penalties and odds."""
        super().add_hard_negatives(logits, hard, position)
        probability = self.probability(logits, position)
        odds = _odds(probability, hard & _within_clamp(probability))
        self.add_sums(self.odds, position, odds)
        penalty = -torch.log1p(-probability.clamp_(MIN_PROBABILITY, 1 - MIN_PROBABILITY))
        self.add_sums(self.penalty, position, penalty.masked_fill_(~hard, 0))

    def finish_hard_negatives(self, collectives: Collectives) -> None:
        """Sums column statistics over ranks. The penalty is one mean over the global batch."""
        if self.shape.dim == 0:
            self.num_hard, self.odds = collectives.sum(torch.stack([self.num_hard, self.odds]))
            num_hard = self.num_hard.sum()
        else:
            num_hard = collectives.sum(self.num_hard.sum())
        self.penalty_weight = (self.rule.weight / num_hard.clamp_min(1)).expand_as(self.total)

    def penalty_share(self) -> Tensor:
        """This rank's part of every row's (column's) penalty."""
        return (self.penalty_weight * self.penalty).sum()

    def positive_losses(self, log_probability: Tensor) -> Tensor:
        """-log of the clamped P_ii."""
        return -log_probability.exp().clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY).log()

    def positive_weight(self) -> Tensor:
        """0 where the clamp removes the gradient."""
        return self.unclamped / self.shape.num_pairs

    def num_clamped(self) -> Tensor:
        """Number of this rank's positives below the clamp."""
        own = self.shape.own
        return ((self.positives[own] - self.total[own]).exp() < MIN_PROBABILITY).sum()

    def gradient(
        self,
        logits: Float[Tensor, "n m"],
        hard: Bool[Tensor, "n m"] | None,
        position: TilePosition,
    ) -> Float[Tensor, "n m"]:
        """The formula above, without the entries beyond the clamp."""
        assert hard is not None
        probability = self.probability(logits, position)
        push = _odds(probability, hard & _within_clamp(probability))
        push.mul_(self.broadcast(self.penalty_weight, position, logits))
        factor = self.positive_weight() - self.penalty_weight * self.odds
        return self.of_positives(probability, factor, position).add_(push)


class LogNegNceDirection(InfoNceDirection):
    """Mean of -log P_ii + weight x mean over H_i of -log(1 - P), in log space."""

    uses_hard_negatives: ClassVar[bool] = True

    def __init__(self, rule: LossRule, shape: DirectionShape, like: Tensor) -> None:
        super().__init__(rule, shape, like)
        # Sums over the hard negatives of a row: -log(1 - P), P / (1 - P) of those that are not
        # dominant, and the number of dominant ones (0 or 1).
        self.penalty, self.odds, self.num_dominant = like.new_zeros(3, shape.size)
        self.penalty_weight = like.new_zeros(shape.size)

    def add_hard_negatives(
        self, logits: Float[Tensor, "n m"], hard: Bool[Tensor, "n m"], position: TilePosition
    ) -> None:
        """Adds a tile's penalties and odds.

        Where an entry is dominant, 1 - P may round to 0. There it is computed from
        `OnlineSoftmax.rest`. A dominant entry is off the diagonal, so the rest is never empty.
        """
        super().add_hard_negatives(logits, hard, position)
        probability = self.probability(self.weighted(logits, position), position)
        dominant = hard & (probability > DOMINANT)
        moderate = hard & ~dominant
        self.add_sums(self.odds, position, _odds(probability, moderate))
        penalty = -torch.log1p(-probability.masked_fill_(~moderate, 0))
        lead = self.broadcast(self.total - self.softmax.rest, position, logits)
        self.add_sums(self.penalty, position, torch.where(dominant, lead, penalty))
        self.add_sums(self.num_dominant, position, dominant.to(logits.dtype))

    def finish_hard_negatives(self, collectives: Collectives) -> None:
        """Sums column statistics over ranks. The penalty is a mean over the row (column)."""
        if self.shape.dim == 0:
            self.num_hard, self.odds, self.num_dominant = collectives.sum(
                torch.stack([self.num_hard, self.odds, self.num_dominant])
            )
        divisor = self.num_hard.clamp_min(1) * self.shape.num_pairs
        self.penalty_weight = self.rule.weight / divisor

    def penalty_share(self) -> Tensor:
        """This rank's part of every row's (column's) penalty."""
        return (self.penalty_weight * self.penalty).sum()

    def gradient(
        self,
        logits: Float[Tensor, "n m"],
        hard: Bool[Tensor, "n m"] | None,
        position: TilePosition,
    ) -> Float[Tensor, "n m"]:
        """The formula above, exact for dominant entries."""
        assert hard is not None
        logits = self.weighted(logits, position)
        probability = self.probability(logits, position)
        dominant = hard & (probability > DOMINANT)
        push = _odds(probability, hard & ~dominant)
        push.mul_(self.broadcast(self.penalty_weight, position, logits))
        factor = self.positive_weight() - self.penalty_weight * self.odds
        result = self.of_positives(probability, factor, position).add_(push)
        return result.add_(self._of_dominant(logits, dominant, position))

    def _of_dominant(self, logits: Tensor, dominant: Tensor, position: TilePosition) -> Tensor:
        """Gradient of penalty_weight x (total - rest) in rows with a dominant entry; else 0."""
        has_dominant = self.num_dominant > 0
        top_probability = (self.softmax.top - self.total).exp()
        push = self.penalty_weight * top_probability * has_dominant
        # Without a dominant entry, rest = inf makes the share exp(l - inf) = 0.
        rest = self.softmax.rest.masked_fill(~has_dominant, torch.inf)
        share_of_rest = (logits - self.broadcast(rest, position, logits)).exp_()
        push = self.broadcast(push, position, logits)
        return torch.where(dominant, push, share_of_rest.mul_(-push))


def _within_clamp(probability: Tensor) -> Tensor:
    return (probability >= MIN_PROBABILITY) & (probability <= 1 - MIN_PROBABILITY)


def _odds(probability: Tensor, selected: Tensor) -> Tensor:
    """P / (1 - P) of the selected entries, 0 elsewhere."""
    probability = probability.masked_fill(~selected, 0)
    return probability / (1 - probability)
