"""Peak memory of the similarity and its loss on one rank, estimated from sizes alone.

A phase is a point of forward or backward that can be the peak. It lists the buffers that are
allocated there, in bytes by name, above the features themselves. The estimate is the largest phase.
The loss is NegNCE in log mode, which needs the most memory.

Not counted: vectors of B and G numbers, masks, and a few MB of scratch in kernels and libraries
for each thread, all small beside `FLOOR_BYTES`; the encoders; TPM-CL.

A formula is needed because the compiled kernels allocate outside of torch's dispatcher, and the
loss selects rows by their values: `AllocationTracker` of `model_memory` can follow neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

from tvr.trainer.memory.similarity_sizes import SimilaritySizes

FLOOR_BYTES = 30_000_000
"""Estimates above this are within `ACCURACY`; below it, uncounted buffers show."""
ACCURACY = 0.15

# Names of buffers, as the table shows them.
FRAMES, WORDS = "copies of the frames", "copies of the words"
FRAME_GRADS, WORD_GRADS = "gradients of the frames", "gradients of the words"
SCORES, SCORE_GRADS = "scores", "gradients of the scores"
SCRATCH, MAXIMA = "scratch of the loss", "indices of the maxima"
TABLES = "word-frame tables"
ALIGNED = "vector-aligned copies"
REMOTE, REMOTE_GRADS = "other ranks' frames", "other ranks' gradients"

# `RowLoss.gradient` at its widest holds 7 numbers, one of them the gradient, and 4 booleans for
# each score of a chunk.
LOSS_SCRATCH = 7 * 4 + 4
VECTOR_WIDTH = 16  # numbers in a vector of the compiled kernels

Phases: TypeAlias = Iterator[tuple[str, Counter[str]]]
"""Pairs of a phase's name and its buffers."""


@dataclass(frozen=True, slots=True)
class SimilarityEstimate:
    """The peak in bytes: its phase, and the buffers that are allocated then."""

    phase: str
    buffers: dict[str, int]
    """Bytes by name, the largest first."""
    inputs: int
    """Bytes of the features themselves, which are not among the buffers."""

    @property
    def above_inputs(self) -> int:
        return sum(self.buffers.values())

    @property
    def total(self) -> int:
        return self.inputs + self.above_inputs


def estimate_similarity(sizes: SimilaritySizes) -> SimilarityEstimate:
    """Estimates the peak of one forward and backward of similarity and loss on one rank."""
    backends = {"compiled": _compiled_phases, "torch": _torch_phases, "naive": _naive_phases}
    phases = _streamed_phases if sizes.streamed else backends[sizes.backend]
    phase, buffers = max(phases(sizes), key=lambda found: found[1].total())
    return SimilarityEstimate(phase, dict(buffers.most_common()), sizes.input_bytes)


def _compiled_phases(n: SimilaritySizes) -> Phases:
    """The compiled similarity of all pairs, then the loss of its scores."""
    pairs, chunk = n.texts * n.videos, n.loss_chunk
    words, frames = n.word_bytes(n.texts), n.frame_bytes(n.videos)
    upcast = words if n.is_upcast else 0
    packed = n.packed_bytes(n.texts) or upcast
    # Unpadded frames, their neighbours, and the sums for the maxima's gradients.
    kept = Counter({FRAMES: (3 if n.neighbour_frames else 1) * frames})
    forward = {
        WORDS: n.packed_bytes(n.texts) + upcast,
        # Contiguous for the kernels; and weighted neighbours, which autograd does not save.
        FRAMES: n.frame_sides * frames,
        MAXIMA: n.maxima_bytes(pairs),
        SCORES: 8 * pairs,
        REMOTE: n.bytes_per_number * frames // 4 if n.ranks > 1 else 0,
    }
    yield "forward", kept + Counter(forward)
    loss = {
        WORDS: packed,
        MAXIMA: n.maxima_bytes(pairs),
        SCORES: 4 * pairs,
        # The gradients of the present chunk are still in the scratch.
        SCORE_GRADS: 4 * (pairs - chunk),
        SCRATCH: LOSS_SCRATCH * chunk,
    }
    yield "backward of the loss", kept + Counter(loss)
    before, after = kept + Counter({WORDS: packed}), kept + Counter({WORD_GRADS: words})
    if not (n.has_words or n.neighbour_frames):
        after -= kept  # the frames are freed once the maxima have their gradients
    yield from _compiled_backward(n, (n.texts, n.videos), before, after, score_bytes=4)
    yield from _last_phases(n, n.videos)


def _streamed_phases(n: SimilaritySizes) -> Phases:
    """Tiles of scores that are freed at once, while the videos arrive in pieces."""
    words, piece = n.word_bytes(n.texts), n.frame_bytes(n.exchanged_videos)
    is_ring = n.exchange == "ring"
    buffers = {
        FRAMES: n.frame_bytes(n.own_videos),
        WORDS: words if n.is_upcast else 0,
        SCORES: 4 * n.texts * n.videos if n.keep_scores else 0,
        REMOTE: (min(2, n.ranks - 1) if is_ring else n.ranks > 1) * piece,
        # A ring sends one piece while it receives another.
        REMOTE_GRADS: (2 if is_ring and n.ranks > 1 else 0) * piece,
    }
    kept = Counter(buffers)
    rows, columns = _last_tiles(n.texts, n.tile[0]), _last_tiles(n.exchanged_videos, n.tile[1])
    for row, column in product(rows, columns):
        yield from _streamed_tile(n, kept, row, column)
    yield "end of a piece", kept + Counter({WORD_GRADS: words, FRAME_GRADS: 2 * piece})
    joined = {WORD_GRADS: 2 * words, FRAME_GRADS: n.frame_bytes(n.own_videos)}
    yield "end of the tiles", kept + Counter(joined)
    yield from _last_phases(n, n.own_videos)


def _last_tiles(size: int, tile: int) -> list[tuple[int, int]]:
    """(start, length) of the last whole tile and of the remainder; earlier tiles need less."""
    whole = size // tile * tile
    return [(whole - tile, tile), *([(whole, size - whole)] if whole < size else [])]


def _streamed_tile(
    n: SimilaritySizes, kept: Counter[str], rows: tuple[int, int], columns: tuple[int, int]
) -> Phases:
    """The backward of one tile of the last piece, beside the gradients of earlier tiles."""
    (row, texts), (column, videos) = rows, columns
    pairs, frames = texts * videos, n.frame_bytes(videos)
    # The first gradient becomes the tile's own buffer, to which later ones are added.
    later = column > 0 or n.exchanged_videos < n.videos
    word_grads = Counter({WORD_GRADS: n.word_bytes(n.texts if later else row)})
    frame_grads = Counter({FRAME_GRADS: n.frame_bytes(column + (videos if row > 0 else 0))})
    tile = kept + frame_grads + Counter({FRAMES: (2 if n.neighbour_frames else 0) * frames})
    loss = {SCORES: 4 * pairs, SCRATCH: LOSS_SCRATCH * pairs, MAXIMA: n.maxima_bytes(pairs)}
    if n.backend != "compiled":
        yield "loss gradient of a tile", tile + word_grads + Counter(loss)
        backward = {
            MAXIMA: n.maxima_bytes(pairs),
            TABLES: _row_sum_bytes(n, texts, videos, n.words if n.has_words else 1),
            SCORE_GRADS: 12 * pairs,
            WORD_GRADS: n.word_bytes(texts),
            FRAME_GRADS: 2 * frames,
        }
        yield "backward of a tile", tile + word_grads + Counter(backward)
        return
    before = tile + word_grads + Counter({WORDS: n.packed_bytes(texts)})
    yield "loss gradient of a tile", before + Counter(loss)
    after = tile + Counter({WORD_GRADS: n.word_bytes(n.texts if later else row + texts)})
    yield from _compiled_backward(n, (texts, videos), before, after, score_bytes=12)


def _compiled_backward(
    n: SimilaritySizes,
    tile: tuple[int, int],
    before: Counter[str],
    after: Counter[str],
    *,
    score_bytes: int,
) -> Phases:
    """The compiled backward of a tile: first of its words, then of its sentences.

    Args:
        before: Other buffers allocated during the words' backward.
        after: Other buffers allocated during the sentences' backward.
        score_bytes: Bytes of the incoming gradients of a pair.
    """
    texts, videos = tile
    pairs, words, frames = texts * videos, n.word_bytes(texts), n.frame_bytes(videos)
    # The kernels copy features whose width is no multiple of a vector.
    unaligned = n.width % VECTOR_WIDTH > 0
    if n.has_words:
        packed = n.packed_bytes(texts) or words
        shared = before + Counter(
            {
                MAXIMA: n.maxima_bytes(pairs),
                SCORE_GRADS: score_bytes * pairs,
                WORD_GRADS: packed,
                FRAME_GRADS: n.frame_sides * frames,
            }
        )
        aligned = unaligned * (packed + n.frame_sides * frames)
        in_kernels = Counter({SCORE_GRADS: 4 * pairs, ALIGNED: aligned})
        yield "backward of the words", shared + in_kernels
        unpacked = Counter({WORD_GRADS: words if n.is_padded else 0})
        yield "backward of the words", shared + unpacked
    sentence = {
        ALIGNED: unaligned * n.frame_sides * frames,
        MAXIMA: pairs,
        SCORE_GRADS: (score_bytes + 4) * pairs,
        # Also the words' gradients of the frames, the mean frame's, or a sum of two of them.
        FRAME_GRADS: max(3, n.frame_sides + (2 if n.has_words else 1)) * frames,
    }
    yield "backward of the sentence", after + Counter(sentence)


def _torch_phases(n: SimilaritySizes) -> Phases:
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
            TABLES: _row_sum_bytes(n, *n.tile, n.words),
        }
        yield "backward of the words", with_maxima + Counter(of_words)
    of_sentence = {
        MAXIMA: pairs,
        SCORE_GRADS: 4 * pairs,
        WORD_GRADS: words,
        FRAME_GRADS: (n.frame_sides + (2 if n.has_words else 1)) * frames,
        TABLES: _row_sum_bytes(n, *n.tile, 1),
    }
    yield "backward of the sentence", kept + Counter(of_sentence)
    yield from _last_phases(n, n.videos)


def _forward_table_bytes(n: SimilaritySizes, texts: int, videos: int) -> int:
    """Bytes of a tile's token-frame scores, and of the maxima of its tokens or of its frames."""
    slots = n.words if n.has_words else 1
    # Similarities and indices of the best frame and of its neighbours, and their correlation.
    of_slots = (32 if n.neighbour_frames else 12) * slots
    if n.has_words:
        of_slots = max(of_slots, 8 * slots + 13 * n.frames)
    pair = 4 * slots * n.frames + of_slots
    return texts * videos * pair + (n.word_bytes(texts) if n.is_padded else 0)


def _row_sum_bytes(n: SimilaritySizes, texts: int, videos: int, slots: int) -> int:
    """Bytes of a tile's weighted gathers of rows and of their transposes."""
    # Row and weight of each token's or frame's maximum, and both sorted by row.
    rows = 28 * texts * videos * (slots if slots == 1 else max(slots, n.frames))
    # Gathered and scattered sums, of this tile and of earlier ones; and the weighted tokens.
    of_tokens = (5 if n.is_padded else 4) * 4 * texts * slots * n.width
    return rows + of_tokens + n.frame_bytes(videos)


def _naive_phases(n: SimilaritySizes) -> Phases:
    """The reference: the tables of all pairs at once."""
    pairs, slots = n.texts * n.videos, n.words if n.has_words else 1
    words, frames = n.word_bytes(n.texts), n.frame_bytes(n.videos)
    kept = Counter({FRAMES: frames, WORDS: words})
    # Temporary sums of similarities; or, without neighbours, scores that are not saved.
    temporary = 12 * slots if n.neighbour_frames else 4 * slots * n.frames
    forward = {
        TABLES: _naive_table_bytes(n, pairs, saved=True) + temporary * pairs,
        WORDS: words if n.is_upcast else 0,
    }
    yield "forward", kept + Counter(forward)
    loss = {
        TABLES: _naive_table_bytes(n, pairs, saved=True),
        SCORES: 4 * pairs,
        SCORE_GRADS: 4 * (pairs - n.loss_chunk),
        SCRATCH: LOSS_SCRATCH * n.loss_chunk,
    }
    yield "backward of the loss", kept + Counter(loss)
    yield "backward of the maxima", kept + Counter({TABLES: _naive_table_bytes(n, pairs)})
    yield from _last_phases(n, n.videos, masked_words=True)


def _naive_table_bytes(n: SimilaritySizes, pairs: int, *, saved: bool = False) -> int:
    """Bytes of the reference's tables: those saved for the backward, or its peak."""
    of_sentence = _naive_pair_bytes(n, 1, saved=saved or n.has_words)
    of_words = _naive_pair_bytes(n, n.words, saved=saved) if n.has_words else 0
    return pairs * (of_sentence + of_words)


def _naive_pair_bytes(n: SimilaritySizes, slots: int, *, saved: bool) -> int:
    """Bytes of one pair with `slots` tokens, saved or at the peak of its backward."""
    scores = 4 * slots * n.frames
    of_frames = 12 * n.frames  # best tokens: their similarity or its gradient, and their indices
    if n.neighbour_frames:
        # The scores are saved to look up the neighbours. Each token has two indices, its best
        # similarity, the neighbour's and their correlation, or gradients of these three.
        return (scores if saved else 2 * scores) + 28 * slots + of_frames
    return (0 if saved else 2 * scores) + 12 * slots + of_frames


def _last_phases(n: SimilaritySizes, videos: int, *, masked_words: bool = False) -> Phases:
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
