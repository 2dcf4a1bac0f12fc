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

    similarity: Literal["info_nce", "neg_nce"] = "neg_nce"
    """Contrastive loss over the pairs of a batch."""
    neg_nce_mode: Literal["reference", "log"] = "log"
    """Form of NegNCE. reference: as in the authors' code. log: in log space,
    without a clamp, negatives normalised per row."""
    neg_nce_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """Weight of the penalty on hard negatives in NegNCE."""
    temperature: Annotated[float, Field(gt=0.0)] = 0.01
    """Logits are similarity / temperature. It is constant, not learned."""
    mask_same_video: bool | None = None
    """Excludes pairs of the same video id from the negatives. None: on for
    neg_nce in log mode, otherwise off."""
    mask_equal_captions: bool | None = None
    """Excludes videos that have the caption of a pair from its negatives.
    Captions are equal but for case, white space and the final punctuation.
    None: on for neg_nce in log mode, otherwise off."""
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
