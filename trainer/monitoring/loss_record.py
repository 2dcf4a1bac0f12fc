"""The terms of a step's loss, each declared once together with its metric; see `step_record`.

A term needs no more than the field: `objective` reads it from the attribute of `LossTerms` that has
the field's name. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tvr.trainer.config import masks_equal_captions
from tvr.trainer.monitoring.field_metric import loss_term, metric

TRAINING, MINING = "Training", "Hard-negative mining"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRecord:
    """Place of a step in the run, and the terms of its loss; None: not computed."""

    step: int = field(
        metadata=metric("tvr_train_step", "Optimiser steps done since the run began.")
    )
    epoch: float = field(
        metadata=metric(
            "tvr_train_epoch",
            "Passes over the training set, with their fraction; with several sets, pairs divided by"
            " the samples of all of them.",
        )
    )
    loss: float = field(
        metadata=loss_term(
            "tvr_train_loss",
            "Terms of the last step's loss: total = similarity + weight x tpm_cl. `penalty` is"
            " the part of `similarity` that NegNCE adds for hard negatives.",
            term="total",
            panel=TRAINING,
        )
    )
    similarity_loss: float = field(metadata=loss_term("tvr_train_loss", term="similarity"))
    tpm_cl_loss: float | None = field(
        metadata=loss_term(
            "tvr_train_loss", term="tpm_cl", applies_to=lambda loss: bool(loss.tpm_cl)
        )
    )
    penalty: float | None = field(
        metadata=loss_term(
            "tvr_train_loss", term="penalty", applies_to=lambda loss: loss.similarity == "neg_nce"
        )
    )
    hard_negatives_per_row: float = field(
        metadata=loss_term(
            "tvr_train_hard_negatives_per_row",
            "Mean number of hard negatives of a text: videos that score above its positive, or"
            " above their own.",
            panel=MINING,
        )
    )
    clamped_share: float | None = field(
        metadata=loss_term(
            "tvr_train_zero_gradient_positives_ratio",
            "Positives whose probability lies under the clamp of NegNCE's reference mode; they"
            " get no gradient.",
            unit="ratio",
            panel=MINING,
            applies_to=lambda loss: (
                (loss.similarity, loss.neg_nce_mode) == ("neg_nce", "reference")
            ),
        )
    )
    positive_similarity: float = field(
        metadata=loss_term(
            "tvr_train_positive_similarity",
            "Mean similarity of the last step's texts with their own videos, before the"
            " temperature. A mean of best cosines, and no cosine: it lies within +-1, with"
            " model.neighbour_frames within +-1.25 (words_to_frames +-1.5), and with"
            " data.content_words in att_wti, too, within +-1.625 (words_to_frames +-2.25).",
            panel=MINING,
            beside="tvr_train_hardest_negative_similarity",
        )
    )
    hardest_similarity: float = field(
        metadata=loss_term(
            "tvr_train_hardest_negative_similarity",
            "Mean similarity of the last step's texts with the most similar of the other videos in"
            " their batch, without those that are no negatives.",
        )
    )
    equal_captions_per_row: float | None = field(
        metadata=loss_term(
            "tvr_train_equal_captions_per_row",
            "Mean number of videos that are no negatives of a text, for their equal caption alone.",
            panel=MINING,
            applies_to=masks_equal_captions,
        )
    )
    dropped_per_row: float | None = field(
        metadata=loss_term(
            "tvr_train_dropped_negatives_per_row",
            "Mean number of videos that are no negatives of a text, because their similarity"
            " exceeds the positive's by more than loss.drop_above.",
            panel=MINING,
            applies_to=lambda loss: loss.drop_above is not None,
        )
    )
