"""Features that hold row numbers, so that their similarity can be any table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tvr.trainer.model.model import Features


def numbered(captions: int, videos: int, first: int = 0) -> Features:
    """Features that hold the number of their row alone; captions are numbered from `first`."""
    return Features(
        sentence=torch.arange(first, first + captions)[:, None].float(),
        words=torch.zeros(captions, 1, 1),
        word_mask=torch.ones(captions, 1, dtype=torch.long),
        frames=torch.arange(videos)[:, None, None].float(),
        frame_mask=torch.ones(videos, 1, dtype=torch.long),
        word_logits=None,
        frame_logits=None,
        margin_hinge=None,
    )


def score_of(table: Tensor) -> Callable[[Features, Features], Tensor]:
    """The similarity of numbered features, read from a table."""

    def score(texts: Features, videos: Features) -> Tensor:
        return table[texts.sentence[:, 0].long()][:, videos.frames[:, 0, 0].long()]

    return score
