"""One direction of InfoNCE, with or without hardness weights."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvr.kernels.row_loss.direction import DirectionLoss, DirectionShape
from tvr.kernels.row_loss.loss_rule import LossRule
from tvr.kernels.row_loss.online_softmax import Collectives, OnlineSoftmax, TilePosition


class InfoNceDirection(DirectionLoss):
    """Mean of -log P_ii, where P is the softmax of a row (or column) i.

    With `hardness` beta > 0 each negative j of the n_i negatives N_i of row i has a weight in the
    denominator, and so in every P:

        P_ij = w_ij e^l_ij / (e^l_ii + sum over k in N_i of w_ik e^l_ik)      w_ii = 1
        w_ij = n_i e^(beta l_ij) / sum over k in N_i of e^(beta l_ik)

    The weights have mean 1 and carry no gradient. They are those of HN-NCE (Radenovic et al. 2023,
    DiHT, arXiv 2301.02280) with alpha = 1. That no gradient flows through them is LLaVE's choice
    (Lan et al. 2025, arXiv 2503.04812), whose weights e^(alpha s_ij) are not normalised.

    With c_i = log n_i - logsumexp over N_i of (beta l_ik), the weighted logit of a negative is
    (1 + beta) l_ij + c_i, so that all formulas of the softmax hold for weighted logits.
    """

    def __init__(self, rule: LossRule, shape: DirectionShape, like: Tensor) -> None:
        super().__init__(rule, shape, like)
        # Of the negatives until `finish_negatives`, then of all entries.
        self.softmax = OnlineSoftmax.empty(shape.size, like)
        self.total = self.softmax.total
        if rule.hardness:
            self.spread = OnlineSoftmax.empty(shape.size, like)  # of the logits times hardness
            self.num_negatives = like.new_zeros(shape.size)
            self.offset = like.new_zeros(shape.size)  # c_i

    def add_negatives(self, logits: Float[Tensor, "n m"], position: TilePosition) -> None:
        """Adds a tile's softmax statistics."""
        dim, first = self.shape.dim, self.first_of_tile(position)
        hardness = self.rule.hardness
        if hardness:
            self.spread.add_tile(first, OnlineSoftmax.of_tile(hardness * logits, dim))
            negative = (logits > -torch.inf).to(logits.dtype)
            self.add_sums(self.num_negatives, position, negative)
            logits = (1 + hardness) * logits
        self.softmax.add_tile(first, OnlineSoftmax.of_tile(logits, dim))

    def finish_negatives(self, positives: Tensor, collectives: Collectives) -> None:
        """Merges column statistics over ranks and adds the positives."""
        self.positives = positives
        if self.shape.dim == 0:
            self.softmax = self.softmax.all_reduce(collectives)
        if self.rule.hardness:
            if self.shape.dim == 0:
                self.spread = self.spread.all_reduce(collectives)
                self.num_negatives = collectives.sum(self.num_negatives)
            offset = self.num_negatives.log() - self.spread.total
            self.offset = offset.masked_fill(self.num_negatives == 0, 0)
            weighted = (self.softmax.top + self.offset, self.softmax.rest + self.offset)
            self.softmax = OnlineSoftmax(*weighted)
        self.softmax = self.softmax.with_entry(positives)
        self.total = self.softmax.total

    def weighted(self, logits: Float[Tensor, "n m"], position: TilePosition) -> Tensor:
        """Logits with the log of the weights of negatives."""
        if not self.rule.hardness:
            return logits
        result = logits * (1 + self.rule.hardness)
        result += self.broadcast(self.offset, position, logits)
        position.diagonal(result)[0].copy_(position.diagonal(logits)[0])
        return result

    def probability(self, weighted: Float[Tensor, "n m"], position: TilePosition) -> Tensor:
        """P of a tile of weighted logits."""
        return (weighted - self.broadcast(self.total, position, weighted)).exp_()

    def share(self) -> Tensor:
        """This rank's share of the direction's loss, with the penalty of a derived form."""
        own = self.shape.own
        lost = self.positive_losses(self.positives[own] - self.total[own])
        return self.penalty_share() + lost.sum() / self.shape.num_pairs

    def positive_losses(self, log_probability: Tensor) -> Tensor:
        """-log P_ii of the matched pairs, from log P_ii."""
        return -log_probability

    def positive_weight(self) -> Tensor:
        """Weight of -log P_ii in the loss, as far as it has a gradient, for each row (column)."""
        return torch.full_like(self.total, 1 / self.shape.num_pairs)

    def gradient(
        self,
        logits: Float[Tensor, "n m"],
        hard: Bool[Tensor, "n m"] | None,
        position: TilePosition,
    ) -> Float[Tensor, "n m"]:
        """P - [matched], divided by G."""
        probability = self.probability(self.weighted(logits, position), position)
        return self.of_positives(probability, self.positive_weight(), position)

    def of_positives(
        self, probability: Tensor, factor: Tensor, position: TilePosition
    ) -> Float[Tensor, "n m"]:
        """factor P - [matched] x `positive_weight`; overwrites the tile of P."""
        result = probability.mul_(self.broadcast(factor, position, probability))
        weight = self.of_matched(self.positive_weight(), result, position)
        position.diagonal(result)[0].sub_(weight)
        return result
