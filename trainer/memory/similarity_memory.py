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
from dataclasses import dataclass
from itertools import product

from tvr.trainer.memory.buffers import (
    ALIGNED,
    FRAME_GRADS,
    FRAMES,
    LOSS_SCRATCH,
    MAXIMA,
    REMOTE,
    REMOTE_GRADS,
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
from tvr.trainer.memory.tile_memory import dense_bytes, dense_phases, row_sum_bytes, torch_phases

FLOOR_BYTES = 30_000_000
"""Estimates above this are within `ACCURACY`; below it, uncounted buffers show."""
ACCURACY = 0.15

VECTOR_WIDTH = 16  # numbers in a vector of the compiled kernels


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
    backends = {
        "compiled": _compiled_phases,
        "torch": torch_phases,
        "dense": dense_phases,
        "naive": _naive_phases,
    }
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
    yield from last_phases(n, n.videos)


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
    yield from last_phases(n, n.own_videos)


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
    # The dense backend has no boosted frames and saves no maxima.
    is_dense = n.backend == "dense"
    boosted = 2 if n.neighbour_frames and not is_dense else 0
    maxima = 0 if is_dense else n.maxima_bytes(pairs)
    tables = dense_bytes if is_dense else row_sum_bytes
    tile = kept + frame_grads + Counter({FRAMES: boosted * frames})
    loss = {SCORES: 4 * pairs, SCRATCH: LOSS_SCRATCH * pairs, MAXIMA: maxima}
    if n.backend != "compiled":
        yield "loss gradient of a tile", tile + word_grads + Counter(loss)
        backward = {
            MAXIMA: maxima,
            TABLES: tables(n, texts, videos, n.words if n.has_words else 1),
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
    # Also the words' gradients of the frames, the mean frame's, or a sum of two of them.
    frame_grads = max(3, n.frame_sides + (2 if n.has_words else 1))
    if not n.both_ways:  # no mean frame
        frame_grads = max(2, n.frame_sides * (2 if n.has_words else 1))
    sentence = {
        ALIGNED: unaligned * n.frame_sides * frames,
        MAXIMA: pairs,
        SCORE_GRADS: (score_bytes + 4) * pairs,
        FRAME_GRADS: frame_grads * frames,
    }
    yield "backward of the sentence", after + Counter(sentence)


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
    yield from last_phases(n, n.videos, masked_words=True)


def _naive_table_bytes(n: SimilaritySizes, pairs: int, *, saved: bool = False) -> int:
    """Bytes of the reference's tables: those saved for the backward, or its peak."""
    of_sentence = _naive_pair_bytes(n, 1, saved=saved or n.has_words)
    of_words = _naive_pair_bytes(n, n.words, saved=saved) if n.has_words else 0
    return pairs * (of_sentence + of_words)


def _naive_pair_bytes(n: SimilaritySizes, slots: int, *, saved: bool) -> int:
    """Bytes of one pair with `slots` tokens, saved or at the peak of its backward."""
    scores = 4 * slots * n.frames
    of_frames = (
        12 * n.frames * n.both_ways
    )  # best tokens: their similarity or its gradient, and their indices
    if n.neighbour_frames:
        # The scores are saved to look up the neighbours. Each token has two indices, its best
        # similarity, the neighbour's and their correlation, or gradients of these three.
        return (scores if saved else 2 * scores) + 28 * slots + of_frames
    # One gradient of the scores from each side.
    return (0 if saved else (1 + n.both_ways) * scores) + 12 * slots + of_frames
