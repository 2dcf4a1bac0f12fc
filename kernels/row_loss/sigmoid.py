"""One direction of the sigmoid loss: every pair is classified on its own."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from tvr.kernels.row_loss.direction import DirectionLoss, DirectionShape
from tvr.kernels.row_loss.loss_rule import LossRule
from tvr.kernels.row_loss.online_softmax import Collectives, TilePosition


class SigmoidDirection(DirectionLoss):
    """Mean over rows (columns) i of -log sigma(x_ii) - sum over negatives of log sigma(-x_ij).

    x = l + b with the logit l and a constant bias b. This is SigLIP's loss (Zhai et al. 2023, arXiv
    2303.15343), where the temperature and b are learned. Without dropped negatives both directions
    are equal, since no pair's term depends on the others.
    """

    def __init__(self, rule: LossRule, shape: DirectionShape, like: Tensor) -> None:
        super().__init__(rule, shape, like)
        self.negatives = like.new_zeros(shape.size)  # sums of -log sigma(-x), of this rank's rows

    def add_negatives(self, logits: Float[Tensor, "n m"], position: TilePosition) -> None:
        """Adds a tile's -log sigma(-x)."""
        lost = functional.logsigmoid(-self.rule.sigmoid_bias - logits).neg_()
        self.add_sums(self.negatives, position, lost)

    def finish_negatives(self, positives: Tensor, collectives: Collectives) -> None:
        """Keeps the positives; the sums of the columns stay this rank's part."""
        self.positives = positives

    def share(self) -> Tensor:
        """This rank's share of the direction's loss."""
        own = self.positives[self.shape.own] + self.rule.sigmoid_bias
        lost = self.negatives.sum() - functional.logsigmoid(own).sum()
        return lost / self.shape.num_pairs

    def gradient(
        self,
        logits: Float[Tensor, "n m"],
        hard: Bool[Tensor, "n m"] | None,
        position: TilePosition,
    ) -> Float[Tensor, "n m"]:
        """sigma(x) of a negative and -sigma(-x) of a matched pair, divided by G."""
        result = (logits + self.rule.sigmoid_bias).sigmoid_()
        matched = position.diagonal(logits)[0] + self.rule.sigmoid_bias
        position.diagonal(result)[0].copy_(-(-matched).sigmoid())
        return result.div_(self.shape.num_pairs)
