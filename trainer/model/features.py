"""The features of a batch, and rows that a frozen tower encodes alike in any batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

ENCODER_TILE = 16
"""Rows that a frozen tower encodes at once, or a multiple of them."""


class Features(NamedTuple):
    """Features of A captions and C videos, as the similarity and the losses take them.

    Sentence, words and frames have unit length (frames do not if `unit_after_header` is off).
    """

    sentence: Tensor
    """(A, D) the text tower's vector of the whole caption; in CLIP, the end token's."""
    words: Tensor
    """(A, T, D) contextual word vectors."""
    word_mask: Tensor
    """(A, T) 0 = padding."""
    frames: Tensor
    """(C, F, D) frame vectors."""
    frame_mask: Tensor
    """(C, F) 0 = padding."""
    word_logits: Tensor | None
    """(A, T) token weights before the masked softmax; none in the ti family."""
    frame_logits: Tensor | None
    """(C, F) frame weights before the masked softmax; none in the ti family."""
    margin_hinge: Tensor | None
    """(B,) TPM-CL of each matched pair; none in evaluation, or if TPM-CL is off."""


def in_whole_tiles(x: Tensor) -> Tensor:
    """Repeats the last row until the number of rows is a multiple of ENCODER_TILE.

    A matrix product works in tiles of rows, and sums the last, smaller tile in another order. With
    whole tiles the output of a row does not depend on the other rows: measured in float32 on CPUs
    for 16 to 192 rows and 1 to 4 threads. GPUs choose among products by the number of rows, so
    there rows agree to rounding.
    """
    missing = -len(x) % ENCODER_TILE
    return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x


def projected(vectors: Tensor, projection: nn.Linear | None) -> Tensor:
    """Vectors of a tower, projected if it does not end with a projection of its own."""
    return vectors if projection is None else projection(vectors.to(projection.weight.dtype))
