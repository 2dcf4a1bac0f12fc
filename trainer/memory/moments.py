"""The words of `alive`: what a moment is, and what all ways of computing the similarity share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TypeAlias

from tvr.kernels.losses import SCORES_PER_CHUNK
from tvr.trainer.memory.sizes import Sizes

# A moment's name, and what is alive then: bytes by name, added up where a name comes twice.
Moments: TypeAlias = Iterator[tuple[str, Counter[str]]]

FRAMES, WORDS = "copies of the frames", "copies of the words"
OF_FRAMES, OF_WORDS = "gradients of the frames", "gradients of the words"
SCORES, OF_SCORES = "scores", "gradients of the scores"
SCRATCH, MAXIMA = "scratch of the loss", "places of the maxima"
TABLES = "word-frame tables"
LANE_COPIES = "copies of whole vectors"
TRAVELLING, OF_TRAVELLING = "other ranks' frames", "gradients under way"

# Of `RowLoss.gradient` at its widest, for each score looked at: 7 numbers, the gradient one of
# them, and 4 truth values.
LOSS_SCRATCH = 7 * 4 + 4


def end(n: Sizes, videos: int, *, masked_words: bool = False) -> Moments:
    """From the gradients of what `token_sets.prepare` made to those of the features."""
    words, frames = n.words_of(n.texts), n.frames_of(videos)
    # The correlation of frames is a product of two: their gradients, and the sum with the first.
    of_frames = {FRAMES: frames, OF_FRAMES: 3 * frames} if n.neighbour_frames else {}
    yield "the end of the backward", Counter({OF_WORDS: words, OF_FRAMES: 2 * frames} | of_frames)
    if masked_words or n.raised:
        share = 1.0 if masked_words else n.bytes_per_number / 4
        parts = {OF_WORDS: words + int(share * words), OF_FRAMES: frames * n.bytes_per_number // 4}
        yield "the end of the backward", Counter(parts)


def scores_at_once(n: Sizes) -> int:
    """Scores that the loss takes at once: whole rows."""
    at_once = SCORES_PER_CHUNK if n.device == "cpu" else 16 * SCORES_PER_CHUNK
    return min(n.texts, max(1, at_once // n.videos)) * n.videos
