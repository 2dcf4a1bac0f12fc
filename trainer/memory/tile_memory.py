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
    if n.has_words and n.both_ways:
        of_slots = max(of_slots, 8 * slots + 13 * n.frames)
    pair = 4 * slots * n.frames + of_slots
    return texts * videos * pair + (n.word_bytes(texts) if n.is_padded else 0)


def row_sum_bytes(n: SimilaritySizes, texts: int, videos: int, slots: int) -> int:
    """Bytes of a tile's weighted gathers of rows and of their transposes."""
    # Row and weight of each token's or frame's maximum, and both sorted by row.
    of_frames = slots > 1 and n.both_ways
    rows = 28 * texts * videos * (max(slots, n.frames) if of_frames else slots)
    # Gathered and scattered sums, of this tile and of earlier ones; and the weighted tokens.
    of_tokens = ((5 if n.is_padded else 4) - (not n.both_ways)) * 4 * texts * slots * n.width
    return rows + of_tokens + n.frame_bytes(videos)


def dense_phases(n: SimilaritySizes) -> Phases:
    """The dense backend: tables of one tile at a time, and nothing else of the pairs but scores."""
    pairs, chunk = n.texts * n.videos, n.loss_chunk
    words, frames = n.word_bytes(n.texts), n.frame_bytes(n.videos)
    kept = Counter({FRAMES: frames, WORDS: words if n.is_upcast else 0})
    slots = n.words if n.has_words else 1
    # Texts sorted by length, or without padding's values; and on a GPU their bfloat16 parts.
    sorted_words = n.packed_bytes(n.texts) if n.is_padded else 0
    operands = words if n.device == "cuda" else 0
    forward = {
        WORDS: sorted_words + operands,
        SCORES: 8 * pairs,
        TABLES: _forward_table_bytes(n, *n.tile_of(slots)),
        REMOTE: n.bytes_per_number * frames // 4 if n.ranks > 1 else 0,
    }
    yield "forward", kept + Counter(forward)
    loss = {SCORES: 4 * pairs, SCORE_GRADS: 4 * (pairs - chunk), SCRATCH: LOSS_SCRATCH * chunk}
    yield "backward of the loss", kept + Counter(loss)
    of_words = {
        SCORE_GRADS: 4 * pairs,
        FRAME_GRADS: frames,
        # Of padded texts, the longest tile comes first: memory of the others is not touched yet.
        WORD_GRADS: 0 if n.is_padded else words,
        WORDS: sorted_words + operands,
        TABLES: dense_bytes(n, *n.tile_of(slots), slots),
    }
    yield "backward of the words", kept + Counter(of_words)
    # The gradients of all tiles are joined.
    joined = {WORD_GRADS: words + (sorted_words or words), TABLES: 0}
    yield "end of the words", kept + Counter(of_words | joined)
    of_sentence = {
        SCORE_GRADS: 4 * pairs,
        # Beside those of the words and of the mean.
        FRAME_GRADS: (2 if n.has_words else 1) * frames,
        WORD_GRADS: words,
        TABLES: dense_bytes(n, *n.tile_of(1), 1),
    }
    yield "backward of the sentence", kept + Counter(of_sentence)
    yield from last_phases(n, n.videos)


def dense_bytes(n: SimilaritySizes, texts: int, videos: int, slots: int) -> int:
    """Bytes of a tile's scores, coefficients and maxima, or of the products that follow."""
    pairs, scores = texts * videos, slots * n.frames
    # Indices of 8 bytes and numbers of 4 of each token's best frame, and then of each frame's best
    # token, while the coefficients are written.
    of_slots, beside = (44 * slots, 28 * slots) if n.neighbour_frames else (16 * slots, 16 * slots)
    if n.has_words and n.both_ways:
        of_slots = max(of_slots, beside + 24 * n.frames)
    written = 8 * scores + of_slots
    # The coefficients and their transposed copy; or the bfloat16 parts and their float32 rest.
    multiplied = (12 if n.device == "cuda" else 8) * scores
    # One operand is transposed, and the other side is the result.
    rows = 4 * (texts * slots + videos * n.frames) * n.width
    return max(pairs * written, pairs * multiplied + rows)
