"""Peak memory of the similarity's two backends in plain torch; see `similarity_memory`."""

from __future__ import annotations

from collections import Counter

from tvr.trainer.memory.buffers import (
    FRAME_GRADS,
    FRAMES,
    LOSS_SCRATCH,
    MAXIMA,
    REMOTE,
    SCORE_GRADS,
    SCORES,
    SCRATCH,
    TABLES,
    WORD_GRADS,
    WORDS,
    Phases,
    last_phases,
)
from tvr.trainer.memory.similarity_sizes import SimilaritySizes


def torch_phases(n: SimilaritySizes) -> Phases:
    """The torch backend: tables of one tile at a time, maxima of all pairs."""
    pairs, chunk = n.texts * n.videos, n.loss_chunk
    words, frames = n.word_bytes(n.texts), n.frame_bytes(n.videos)
    kept = Counter(
        {
            # The same copies as in the compiled similarity.
            FRAMES: (3 if n.neighbour_frames else 1) * frames,
            WORDS: words if n.is_upcast else 0,
        }
    )
    with_maxima = kept + Counter({MAXIMA: n.maxima_bytes(pairs)})
    forward = {
        FRAMES: frames if n.neighbour_frames else 0,
        SCORES: 8 * pairs,
        TABLES: _forward_table_bytes(n, *n.tile),
        REMOTE: n.bytes_per_number * frames // 4 if n.ranks > 1 else 0,
    }
    yield "forward", with_maxima + Counter(forward)
    loss = {SCORES: 4 * pairs, SCORE_GRADS: 4 * (pairs - chunk), SCRATCH: LOSS_SCRATCH * chunk}
    yield "backward of the loss", with_maxima + Counter(loss)
    if n.has_words:
        of_words = {
            SCORE_GRADS: 4 * pairs,
            FRAME_GRADS: n.frame_sides * frames,
            WORD_GRADS: words,
            TABLES: row_sum_bytes(n, *n.tile, n.words),
        }
        yield "backward of the words", with_maxima + Counter(of_words)
    of_sentence = {
        MAXIMA: pairs,
        SCORE_GRADS: 4 * pairs,
        WORD_GRADS: words,
        FRAME_GRADS: (n.frame_sides + (2 if n.has_words else 1)) * frames,
        TABLES: row_sum_bytes(n, *n.tile, 1),
    }
    yield "backward of the sentence", kept + Counter(of_sentence)
    yield from last_phases(n, n.videos)


def _forward_table_bytes(n: SimilaritySizes, texts: int, videos: int) -> int:
    """Bytes of a tile's token-frame scores, and of the maxima of its tokens or of its frames."""
    slots = n.words if n.has_words else 1
    # Similarities and indices of the best frame and of its neighbours, and their correlation.
    of_slots = (32 if n.neighbour_frames else 12) * slots
    if n.has_words:
        of_slots = max(of_slots, 8 * slots + 13 * n.frames)
    pair = 4 * slots * n.frames + of_slots
    return texts * videos * pair + (n.word_bytes(texts) if n.is_padded else 0)


def row_sum_bytes(n: SimilaritySizes, texts: int, videos: int, slots: int) -> int:
    """Bytes of a tile's weighted gathers of rows and of their transposes."""
    # Row and weight of each token's or frame's maximum, and both sorted by row.
    rows = 28 * texts * videos * (slots if slots == 1 else max(slots, n.frames))
    # Gathered and scattered sums, of this tile and of earlier ones; and the weighted tokens.
    of_tokens = (5 if n.is_padded else 4) * 4 * texts * slots * n.width
    return rows + of_tokens + n.frame_bytes(videos)


def dense_phases(n: SimilaritySizes) -> Phases:
    """The dense backend: tables of one tile at a time, and nothing else of the pairs but scores."""
    pairs, chunk = n.texts * n.videos, n.loss_chunk
    words, frames = n.word_bytes(n.texts), n.frame_bytes(n.videos)
    kept = Counter({FRAMES: frames, WORDS: words if n.is_upcast else 0})
    slots = n.words if n.has_words else 1
    # Texts sorted by length, or without padding's values.
    sorted_words = words if n.is_padded else 0
    forward = {
        WORDS: sorted_words,
        SCORES: 8 * pairs,
        TABLES: _forward_table_bytes(n, *n.tile_of(slots)),
        REMOTE: n.bytes_per_number * frames // 4 if n.ranks > 1 else 0,
    }
    yield "forward", kept + Counter(forward)
    loss = {SCORES: 4 * pairs, SCORE_GRADS: 4 * (pairs - chunk), SCRATCH: LOSS_SCRATCH * chunk}
    yield "backward of the loss", kept + Counter(loss)
    # The backward of the words, and then of the sentences beside the words' gradients.
    for size in (slots, 1):
        of_frames = 1 if size > 1 else (3 if n.has_words else 2)
        tile = {
            SCORE_GRADS: 4 * pairs,
            FRAME_GRADS: of_frames * frames,
            WORD_GRADS: words,
            WORDS: sorted_words if size > 1 else 0,
            TABLES: dense_bytes(n, *n.tile_of(size), size),
        }
        yield "backward of the " + ("words" if size > 1 else "sentence"), kept + Counter(tile)
    yield from last_phases(n, n.videos)


def dense_bytes(n: SimilaritySizes, texts: int, videos: int, slots: int) -> int:
    """Bytes of a tile's scores and coefficients, and of the operands and results of products."""
    # Scores, coefficients, and their transposed copy; or their bfloat16 parts on a GPU.
    of_scores = 12 * slots * n.frames
    # Indices of 8 bytes and similarities of each maximum, while the coefficients are written.
    of_maxima = 8 * slots + 24 * n.frames
    rows = texts * slots + videos * n.frames
    return texts * videos * (of_scores + of_maxima) + 2 * 4 * rows * n.width
