"""The values that a loss over one rank's rows returns."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tvr.kernels.row_loss.row_loss import RowLoss


@dataclass(frozen=True)
class LossTerms:
    """One rank's share of a loss: the sum of a field over ranks is the global batch's value.

    The first three fields carry a gradient.
    """

    loss: Float[Tensor, ""]
    """Mean of the two directions."""
    text_to_video: Float[Tensor, ""]
    video_to_text: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    """Part of `loss` that NegNCE adds for hard negatives."""
    hard_negatives_per_row: Float[Tensor, ""]
    """Mean number of hard negatives of a text, without those that are left out."""
    clamped_share: Float[Tensor, ""]
    """Share of the positives, over both directions, without gradient in `reference` mode, because
    the clamp raises their probability."""
    positive_similarity: Float[Tensor, ""]
    """Mean over texts of the similarity with their own video."""
    hardest_similarity: Float[Tensor, ""]
    """Mean over texts of the largest similarity with a negative."""
    equal_captions_per_row: Float[Tensor, ""]
    """Mean number of videos that are no negatives of a text because another video has its caption;
    0 where captions are not compared."""
    dropped_per_row: Float[Tensor, ""]
    """Mean number of videos that are no negatives of a text because their similarity exceeds the
    positive's by more than `LossRule.drop_above`."""


def loss_terms(loss: RowLoss, shares: tuple[Tensor, Tensor]) -> LossTerms:
    """Builds the terms after both passes; `shares` are the two directions, with gradient."""
    text_to_video, video_to_text = shares
    return LossTerms(
        (text_to_video + video_to_text) / 2, text_to_video, video_to_text, *loss.statistics()
    )
