"""The settings of a loss over the similarities of a global batch, and which of them go together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tvr.kernels.row_loss.excluded_pairs import ExcludedPairs, compared_ids

NEG_NCE_MODES = ("reference", "log", "set")
SIGLIP_BIAS = -10.0  # initial bias of SigLIP, arXiv 2303.15343, section 3.2


@dataclass(frozen=True)
class LossRule:
    """Settings of the loss over the similarities of the global batch; see `losses`.

    Raises:
        ValueError: unknown mode, a number out of range, or settings that contradict each other.
    """

    neg_nce_mode: str | None
    """None selects InfoNCE or the sigmoid loss; "reference", "log" and "set" are the modes of
    NegNCE."""
    scale: float = 100.0
    """1 / temperature."""
    weight: float = 0.5
    """Weight of the NegNCE penalty."""
    mask_same_video: bool | None = None
    """True excludes pairs of equal video id; None does so in `log` and `set` mode if ids are
    given."""
    mask_equal_captions: bool | None = None
    """The same for pairs of equal caption id."""
    hardness: float = 0.0
    """Exponent beta of the weights of negatives in a softmax's denominator; 0 weights none."""
    drop_above: float | None = None
    """A negative whose similarity exceeds its positive's by more than this is left out."""
    sigmoid: bool = False
    """Selects the sigmoid loss instead of InfoNCE."""
    sigmoid_bias: float = SIGLIP_BIAS
    """Added to every logit of the sigmoid loss."""

    def __post_init__(self) -> None:
        mode = self.neg_nce_mode
        if mode is not None and mode not in NEG_NCE_MODES:
            raise ValueError(f"mode={mode!r} of NegNCE is unknown; use 'reference', 'log' or 'set'")
        if not (self.hardness >= 0 and math.isfinite(self.hardness)):
            raise ValueError(f"hardness={self.hardness} must be a number of at least 0; 0 is off")
        if self.drop_above is not None and not self.drop_above >= 0:
            raise ValueError(
                f"drop_above={self.drop_above} must be a similarity of at least 0, or None"
            )
        if self.sigmoid and mode is not None:
            raise ValueError(f"the sigmoid loss has no penalty: use mode None, not {mode!r}")
        if self.sigmoid and self.hardness:
            raise ValueError(
                f"hardness={self.hardness} weights the denominator of a softmax, which the sigmoid"
                " loss does not have: use 0, or InfoNCE or NegNCE"
            )
        if mode == "reference" and (self.hardness or self.drop_above is not None):
            raise ValueError(
                "NegNCE's mode 'reference' is the published loss, without weights or dropped"
                f" negatives, but hardness={self.hardness} and drop_above={self.drop_above}: use"
                " the mode 'log' or 'set', or set hardness 0 and drop_above None"
            )

    def excluded_pairs(
        self, num_pairs: int, video_ids: Tensor | None, caption_ids: Tensor | None
    ) -> ExcludedPairs:
        """Pairs that are no negatives; the ids are those of all G pairs. Raises ValueError."""
        masks = (
            ("video_ids", video_ids, "mask_same_video"),
            ("caption_ids", caption_ids, "mask_equal_captions"),
        )
        by_default = self.neg_nce_mode in ("log", "set")
        return ExcludedPairs(
            *(
                compared_ids(
                    name,
                    ids,
                    num_pairs,
                    mask=getattr(self, setting),
                    setting=setting,
                    by_default=by_default,
                )
                for name, ids, setting in masks
            )
        )
