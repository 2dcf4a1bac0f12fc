"""The section `loss`: the training objective.

The docstring below a field is its `--help` text. These docstrings wrap at 70 characters, since
`--help` keeps their line breaks on a terminal of 80.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tvr.trainer.config_sections.field_types import STRICT, Share


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossConfig:
    """The training objective."""

    similarity: Literal["info_nce", "neg_nce", "sigmoid"] = "neg_nce"
    """Contrastive loss over the pairs of a batch. sigmoid: SigLIP's, which
    classifies each pair on its own."""
    neg_nce_mode: Literal["reference", "log", "set"] = "log"
    """Form of NegNCE. reference: as in the authors' code. log: in log space,
    without a clamp, negatives normalised per row. set: one penalty on all
    hard negatives of a row, which does not fade as the batch grows."""
    neg_nce_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """Weight of the penalty on hard negatives in NegNCE."""
    temperature: Annotated[float, Field(gt=0.0)] = 0.01
    """Logits are similarity / temperature. It is constant, not learned."""
    hardness: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Weights each negative in the denominators of the softmax by
    exp(hardness x logit), to mean 1 and without gradient (HN-NCE). 0: off.
    For info_nce, and for neg_nce in log or set mode."""
    drop_above: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    """Leaves out negatives whose similarity exceeds their positive's by more
    than this: false negatives, probably. None: off. Not for neg_nce in
    reference mode."""
    sigmoid_bias: Annotated[float, Field(allow_inf_nan=False)] = -10.0
    """Added to the logits of the sigmoid loss. It is constant, not learned. A
    pair of similarity -sigmoid_bias x temperature has probability 1/2."""
    mask_same_video: bool | None = None
    """Excludes pairs of the same video id from the negatives. None: on for
    neg_nce in log or set mode, otherwise off."""
    mask_equal_captions: bool | None = None
    """Excludes videos that have the caption of a pair from its negatives.
    Captions are equal but for case, white space and the final punctuation.
    None: on for neg_nce in log or set mode, otherwise off."""
    tpm_cl: Literal[0, 2, 3, 4] = 4
    """Type of TPM-CL, the loss on partially masked samples. 0: off. 2:
    margins 1 and 2. 3: margin 3. 4: all three margins."""
    tpm_cl_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of TPM-CL in the loss."""
    margin: Annotated[float, Field(ge=0.0)] = 0.6
    """Margin of the TPM-CL hinge."""
    mask_threshold: Share = 0.6
    """Share of the token weight that is removed from the partial samples of
    TPM-CL."""
    straight_through: bool = False
    """Passes a gradient to the frame-weight predictor of TPM-CL, which
    otherwise keeps its initial weights, as in the method."""
    normalise_partial: bool = False
    """Normalises the partial text vector of TPM-CL to unit length, as the
    whole one."""
    mask_padding_weights: bool = False
    """Gives padding words and frames no weight in the predictors of TPM-CL."""

    def __post_init__(self) -> None:
        of_reference = self.similarity == "neg_nce" and self.neg_nce_mode == "reference"
        if self.hardness and (self.similarity == "sigmoid" or of_reference):
            raise ValueError(
                f"loss.hardness={self.hardness} needs loss.similarity info_nce, or neg_nce with"
                " loss.neg_nce_mode log or set: the sigmoid loss has no denominator, and the"
                " reference mode is the published loss"
            )
        if self.drop_above is not None and of_reference:
            raise ValueError(
                f"loss.drop_above={self.drop_above} needs loss.neg_nce_mode log or set, or"
                " loss.similarity info_nce or sigmoid: the reference mode is the published loss"
            )
