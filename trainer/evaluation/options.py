"""The choices of an evaluation; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """The choices of an evaluation. The defaults are those of the published tables."""

    equal_captions: bool = False
    """The videos of equal captions are right for all of these captions; adds mAP and nDCG@10.
    Published tables count only a caption's own video."""
    paragraphs: bool = False
    """Joins the captions of each video to one query."""
    dual_softmax: float | None = None
    """Adds results by dual softmax, with this temperature in units of the similarity; 0.01 is
    usual. They are kept apart from the raw ones."""
    qb_norm: str | None = None
    """Adds results by QB-Norm, with this bank of training captions: a packed data set, or for
    --features a folder of features of the same model. They are kept apart from the raw ones."""
    bank_captions: int | None = None
    """Captions that the bank takes, evenly spread over its set. None: all."""
    bank_shared: Literal["refuse", "drop"] = "refuse"
    """What happens if the bank holds captions of the test set: it is refused, or they are dropped
    and counted."""
    beta: float = 20.0
    """Inverse temperature of QB-Norm."""
    top_videos: int = 5
    """Best videos that are stored for each query."""

    def __post_init__(self) -> None:
        # Beyond these ends scores differ by less than their rounding.
        if self.dual_softmax is not None and not 1e-5 <= self.dual_softmax <= 100:
            raise ValueError(
                f"dual_softmax={self.dual_softmax} must be from 1e-5 to 100, such as 0.01"
            )
        if not 1e-3 <= self.beta <= 1e5:
            raise ValueError(f"beta={self.beta} must be from 1e-3 to 1e5, such as 20")
        if self.bank_captions is not None and self.bank_captions < 1:
            raise ValueError(f"bank_captions={self.bank_captions} must be at least 1")
        if self.top_videos < 1:
            raise ValueError(f"top_videos={self.top_videos} must be at least 1")
        if self.qb_norm is None and (self.bank_captions is not None or self.bank_shared == "drop"):
            raise ValueError("bank_captions and bank_shared need qb_norm, the bank")
        if self.qb_norm is None and self.beta != 20.0:
            raise ValueError(f"beta={self.beta} needs qb_norm, the bank")


DEFAULTS = EvaluationOptions()
EQUALITY = "case, accents' encoding, white space and sentence marks at the end do not count"
"""The rule of `normal_caption`, by which captions are equal."""
