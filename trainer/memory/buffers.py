"""Buffers of the similarity's memory estimate: names, and the last phases of all backends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TypeAlias

from tvr.trainer.memory.similarity_sizes import SimilaritySizes

# Names of buffers, as the table shows them.
FRAMES, WORDS = "copies of the frames", "copies of the words"
FRAME_GRADS, WORD_GRADS = "gradients of the frames", "gradients of the words"
SCORES, SCORE_GRADS = "scores", "gradients of the scores"
SCRATCH, MAXIMA = "scratch of the loss", "indices of the maxima"
TABLES = "word-frame tables"
ALIGNED = "vector-aligned copies"
REMOTE, REMOTE_GRADS = "other ranks' frames", "other ranks' gradients"

# `RowLoss.gradient` at its widest holds 7 numbers, one of them the gradient, and 4 booleans for
# each score of a chunk. `loss.hardness` and `loss.drop_above` add a number each, not counted here.
LOSS_SCRATCH = 7 * 4 + 4

Phases: TypeAlias = Iterator[tuple[str, Counter[str]]]
"""Pairs of a phase's name and its buffers."""


def last_phases(n: SimilaritySizes, videos: int, *, masked_words: bool = False) -> Phases:
    """From the gradients of the prepared token sets to the gradients of the features."""
    words, frames = n.word_bytes(n.texts), n.frame_bytes(videos)
    # The correlation of frames is a product of two: their gradients, and the sum with the first.
    of_frames = {FRAMES: frames, FRAME_GRADS: 3 * frames} if n.neighbour_frames else {}
    last = {WORD_GRADS: words, FRAME_GRADS: 2 * frames} | of_frames
    yield "end of the backward", Counter(last)
    if masked_words or n.is_upcast:
        share = 1.0 if masked_words else n.bytes_per_number / 4
        cast = {
            WORD_GRADS: words + int(share * words),
            FRAME_GRADS: frames * n.bytes_per_number // 4,
        }
        yield "end of the backward", Counter(cast)
