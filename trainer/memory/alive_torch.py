"""What is alive in the torch tiles, and in the reference; `alive` says what is counted."""

from __future__ import annotations

from collections import Counter

from tvr.trainer.memory.moments import (
    FRAMES,
    LOSS_SCRATCH,
    MAXIMA,
    OF_FRAMES,
    OF_SCORES,
    OF_WORDS,
    SCORES,
    SCRATCH,
    TABLES,
    TRAVELLING,
    WORDS,
    Moments,
    end,
    scores_at_once,
)
from tvr.trainer.memory.sizes import Sizes


def tiles(n: Sizes) -> Moments:
    """The torch backend: of one tile at a time there are tables, of all pairs the maxima."""
    pairs, looked_at = n.texts * n.videos, scores_at_once(n)
    words, frames = n.words_of(n.texts), n.frames_of(n.videos)
    kept = Counter(
        {
            # As the compiled kernels keep them.
            FRAMES: (3 if n.neighbour_frames else 1) * frames,
            WORDS: words if n.raised else 0,
        }
    )
    before = kept + Counter({MAXIMA: n.maxima(pairs)})
    of_forward = {
        FRAMES: frames if n.neighbour_frames else 0,
        SCORES: 8 * pairs,
        TABLES: _met(n, *n.tile),
        TRAVELLING: n.bytes_per_number * frames // 4 if n.ranks > 1 else 0,
    }
    yield "the forward", before + Counter(of_forward)
    of_loss = {SCORES: 4 * pairs, OF_SCORES: 4 * (pairs - looked_at)}
    yield "the loss's backward", before + Counter(of_loss | {SCRATCH: LOSS_SCRATCH * looked_at})
    sides = 2 if n.neighbour_frames else 1
    if n.has_words:
        of_words = {OF_SCORES: 4 * pairs, OF_FRAMES: sides * frames, OF_WORDS: words}
        of_words[TABLES] = going_back(n, *n.tile, n.words)
        yield "the backward of the words", before + Counter(of_words)
    of_sentence = {MAXIMA: pairs, OF_SCORES: 4 * pairs, OF_WORDS: words}
    of_sentence[OF_FRAMES] = (sides + (2 if n.has_words else 1)) * frames
    of_sentence[TABLES] = going_back(n, *n.tile, 1)
    yield "the backward of the sentence", kept + Counter(of_sentence)
    yield from end(n, n.videos)


def _met(n: Sizes, texts: int, videos: int) -> int:
    """Bytes of a tile's products, and of the maxima of its tokens or of its frames."""
    slots = n.words if n.has_words else 1
    # Similarities and places of the best, of their neighbours, and their correlation.
    of_slots = (32 if n.neighbour_frames else 12) * slots
    if n.has_words:
        of_slots = max(of_slots, 8 * slots + 13 * n.frames)
    pair = 4 * slots * n.frames + of_slots
    return texts * videos * pair + (n.words_of(texts) if n.padded else 0)


def going_back(n: Sizes, texts: int, videos: int, slots: int) -> int:
    """Bytes of a tile's lists of rows, and of the sums of rows that they give."""
    # Row and factor of each token's or frame's maximum; sorted by row, whose they are.
    lists = 28 * texts * videos * (slots if slots == 1 else max(slots, n.frames))
    # What the tokens chose and met, of this tile and of those before; and their weighted selves.
    of_tokens = (5 if n.padded else 4) * 4 * texts * slots * n.width
    return lists + of_tokens + n.frames_of(videos)


def naive(n: Sizes) -> Moments:
    """The reference: every table of token pairs at once."""
    pairs, slots = n.texts * n.videos, n.words if n.has_words else 1
    words, frames = n.words_of(n.texts), n.frames_of(n.videos)
    kept = Counter({FRAMES: frames, WORDS: words})
    # Sums of similarities on their way; or, which no neighbours need later, the scores.
    passing = 12 * slots if n.neighbour_frames else 4 * slots * n.frames
    of_forward = {
        TABLES: _tables(n, pairs, saved=True) + passing * pairs,
        WORDS: words if n.raised else 0,
    }
    yield "the forward", kept + Counter(of_forward)
    of_loss = {
        TABLES: _tables(n, pairs, saved=True),
        SCORES: 4 * pairs,
        OF_SCORES: 4 * (pairs - scores_at_once(n)),
        SCRATCH: LOSS_SCRATCH * scores_at_once(n),
    }
    yield "the loss's backward", kept + Counter(of_loss)
    yield "the backward of the maxima", kept + Counter({TABLES: _tables(n, pairs)})
    yield from end(n, n.videos, masked_words=True)


def _tables(n: Sizes, pairs: int, *, saved: bool = False) -> int:
    """The reference's tables of so many pairs; `saved`: those kept for the backward alone."""
    of_sentence = _table(n, 1, saved=True)
    if not n.has_words:
        return pairs * (of_sentence if saved else _table(n, 1))
    return pairs * (of_sentence + _table(n, n.words, saved=saved))


def _table(n: Sizes, slots: int, *, saved: bool = False) -> int:
    """Bytes of a pair with so many tokens in a set, saved or at the peak of the set's backward."""
    scores = 4 * slots * n.frames
    of_frames = 12 * n.frames  # best tokens: their similarity or its gradient, and their places
    if n.neighbour_frames:
        # The scores, since their neighbours are looked up; of each token two places, and its best
        # similarity, the neighbour's and their correlation, or gradients of all three.
        return (scores if saved else 2 * scores) + 28 * slots + of_frames
    return (0 if saved else 2 * scores) + 12 * slots + of_frames
