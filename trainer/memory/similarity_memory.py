"""What is alive at the moments that can be the peak of the similarity and its loss, from sizes.

Counted on one rank, forward and backward, above the features that come in. The letters are those of
`kernels.reference`. Left out is what stays small beside 30 MB: lines of B and G numbers, masks, and
a few MB of the kernels' and libraries' scratch for each thread. The loss is NegNCE in log mode, the
widest. `memory` takes the largest moment; the encoders and TPM-CL are no part of it.
"""

from __future__ import annotations

from collections import Counter
from itertools import product

from tvr.trainer.memory.alive_torch import going_back
from tvr.trainer.memory.moments import (
    FRAMES,
    LANE_COPIES,
    LOSS_SCRATCH,
    MAXIMA,
    OF_FRAMES,
    OF_SCORES,
    OF_TRAVELLING,
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

LANES = 16  # numbers in a vector of the compiled kernels


def compiled(n: Sizes) -> Moments:
    """The compiled similarity of all pairs, then the loss of its scores."""
    pairs, looked_at = n.texts * n.videos, scores_at_once(n)
    words, frames = n.words_of(n.texts), n.frames_of(n.videos)
    raised = words if n.raised else 0
    packed = n.packed(n.texts) or raised
    # Without padding; the neighbours found for them; the sums that the maxima's gradients meet.
    kept = Counter({FRAMES: (3 if n.neighbour_frames else 1) * frames})
    of_forward = {
        WORDS: n.packed(n.texts) + raised,
        # Side by side for the kernels; and neighbours times strength, which autograd needs not.
        FRAMES: (2 if n.neighbour_frames else 1) * frames,
        MAXIMA: n.maxima(pairs),
        SCORES: 8 * pairs,
        TRAVELLING: n.bytes_per_number * frames // 4 if n.ranks > 1 else 0,
    }
    yield "the forward", kept + Counter(of_forward)
    of_loss = {
        WORDS: packed,
        MAXIMA: n.maxima(pairs),
        SCORES: 4 * pairs,
        # Those of the rows looked at are still in the scratch.
        OF_SCORES: 4 * (pairs - looked_at),
        SCRATCH: LOSS_SCRATCH * looked_at,
    }
    yield "the loss's backward", kept + Counter(of_loss)
    before, after = kept + Counter({WORDS: packed}), kept + Counter({OF_WORDS: words})
    if not (n.has_words or n.neighbour_frames):
        after -= kept  # nothing else needs the frames when the maxima's gradients are there
    yield from _of_sets(n, (n.texts, n.videos), before, after, of_scores=4)
    yield from end(n, n.videos)


def streamed(n: Sizes) -> Moments:
    """Tiles of scores that are forgotten at once, while the videos pass by in pieces."""
    words, piece = n.words_of(n.texts), n.frames_of(n.videos_at_once)
    parts = {
        FRAMES: n.frames_of(n.own_videos),
        WORDS: words if n.raised else 0,
        SCORES: 4 * n.texts * n.videos if n.keep_scores else 0,
        TRAVELLING: (min(2, n.ranks - 1) if n.exchange == "ring" else n.ranks > 1) * piece,
        # Of a ring, leaving and arriving.
        OF_TRAVELLING: (2 if n.exchange == "ring" and n.ranks > 1 else 0) * piece,
    }
    kept = Counter(parts)
    rows, columns = _last_tiles(n.texts, n.tile[0]), _last_tiles(n.videos_at_once, n.tile[1])
    for tile in product(rows, columns):
        yield from _streamed_tile(n, kept, *tile)
    yield "the end of a piece", kept + Counter({OF_WORDS: words, OF_FRAMES: 2 * piece})
    joined = {OF_WORDS: 2 * words, OF_FRAMES: n.frames_of(n.own_videos)}
    yield "the end of the tiles", kept + Counter(joined)
    yield from end(n, n.own_videos)


def _last_tiles(size: int, tile: int) -> list[tuple[int, int]]:
    """(first, length) of the last whole tile and of what is left; before them less is alive."""
    whole = size // tile * tile
    return [(whole - tile, tile), *([(whole, size - whole)] if whole < size else [])]


def _streamed_tile(
    n: Sizes, kept: Counter[str], rows: tuple[int, int], columns: tuple[int, int]
) -> Moments:
    """The backward of one tile of the last piece, when those before have left their gradients."""
    (row, texts), (column, videos) = rows, columns
    pairs, frames = texts * videos, n.frames_of(videos)
    # A first gradient becomes the tile's own buffer; later ones are added to that.
    later = column > 0 or n.videos_at_once < n.videos
    of_words = Counter({OF_WORDS: n.words_of(n.texts if later else row)})
    of_frames = Counter({OF_FRAMES: n.frames_of(column + (videos if row > 0 else 0))})
    if n.backend != "compiled":
        tile = kept + of_words + of_frames + Counter({MAXIMA: n.maxima(pairs)})
        tile += Counter({FRAMES: (2 if n.neighbour_frames else 0) * frames})
        of_loss = {SCORES: 4 * pairs, SCRATCH: LOSS_SCRATCH * pairs}
        yield "the loss's gradient in a tile", tile + Counter(of_loss)
        lists = {TABLES: going_back(n, texts, videos, n.words if n.has_words else 1)}
        sums = {OF_SCORES: 12 * pairs, OF_WORDS: n.words_of(texts), OF_FRAMES: 2 * frames}
        yield "the backward of a tile", tile + Counter(lists | sums)
        return
    tile = kept + of_frames + Counter({FRAMES: (2 if n.neighbour_frames else 0) * frames})
    before = tile + of_words + Counter({WORDS: n.packed(texts)})
    of_loss = {MAXIMA: n.maxima(pairs), SCORES: 4 * pairs, SCRATCH: LOSS_SCRATCH * pairs}
    yield "the loss's gradient in a tile", before + Counter(of_loss)
    after = tile + Counter({OF_WORDS: n.words_of(n.texts if later else row + texts)})
    yield from _of_sets(n, (texts, videos), before, after, of_scores=12)


def _of_sets(
    n: Sizes,
    tile: tuple[int, int],
    before: Counter[str],
    after: Counter[str],
    *,
    of_scores: int,
) -> Moments:
    """The compiled backward of a tile's words, then of its sentences.

    `before` and `after` are alive beside it, in the words' and in the sentences' part; `of_scores`
    are the bytes of a pair's gradients on their way in.
    """
    texts, videos = tile
    pairs, words, frames = texts * videos, n.words_of(texts), n.frames_of(videos)
    # Gradients of the frames that the maxima met, and of those that chose among the words.
    sides = 2 if n.neighbour_frames else 1
    # Copies in the kernels whose width is whole vectors, where that of the features is not.
    cut = n.width % LANES > 0
    if n.has_words:
        packed = n.packed(texts) or words
        parts = {
            MAXIMA: n.maxima(pairs),
            OF_SCORES: of_scores * pairs,
            OF_WORDS: packed,
            OF_FRAMES: sides * frames,
        }
        met = before + Counter(parts)
        in_kernels = {OF_SCORES: 4 * pairs, LANE_COPIES: cut * (packed + sides * frames)}
        yield "the backward of the words", met + Counter(in_kernels)
        with_padding = {OF_WORDS: words if n.padded else 0}
        yield "the backward of the words", met + Counter(with_padding)
    parts = {
        LANE_COPIES: cut * sides * frames,
        MAXIMA: pairs,
        OF_SCORES: (of_scores + 4) * pairs,
        # Beside its own: what the words left, the mean frame's, or the sum of two of them.
        OF_FRAMES: max(3, sides + (2 if n.has_words else 1)) * frames,
    }
    yield "the backward of the sentence", after + Counter(parts)
