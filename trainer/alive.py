"""What is alive at the moments that can be the peak of the similarity and its loss, from sizes.

Counted on one rank, forward and backward, above the features that come in. The letters are those of
`kernels.reference`. Left out is what stays small beside 30 MB: lines of B and G numbers, masks, and
a few MB of the kernels' and libraries' scratch for each thread. The loss is NegNCE in log mode, the
widest. `memory` takes the largest moment; the encoders and TPM-CL are no part of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import TypeAlias

from tvr.kernels.losses import SCORES_AT_ONCE
from tvr.trainer.sizes import Sizes

# A moment's name, and what is alive then: bytes by name, added up where a name comes twice.
Moments: TypeAlias = Iterator[tuple[str, Counter[str]]]

FRAMES, WORDS = "copies of the frames", "copies of the words"
OF_FRAMES, OF_WORDS = "gradients of the frames", "gradients of the words"
SCORES, OF_SCORES = "scores", "gradients of the scores"
SCRATCH, MAXIMA = "scratch of the loss", "places of the maxima"
TABLES = "word-frame tables"
LANE_COPIES = "copies of whole vectors"
TRAVELLING, OF_TRAVELLING = "other ranks' frames", "gradients under way"

LANES = 16  # numbers in a vector of the compiled kernels
# Of `RowLoss.gradient` at its widest, for each score looked at: 7 numbers, the gradient one of
# them, and 4 truth values.
LOSS_SCRATCH = 7 * 4 + 4


def compiled(n: Sizes) -> Moments:
    """The compiled similarity of all pairs, then the loss of its scores."""
    pairs, looked_at = n.texts * n.videos, _looked_at(n)
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
    yield from _end(n, n.videos)


def streamed(n: Sizes) -> Moments:
    """Tiles of scores that are forgotten at once, while the videos pass by in pieces."""
    words, piece = n.words_of(n.texts), n.frames_of(n.videos_at_once)
    parts = {
        FRAMES: n.frames_of(n.own_videos),
        WORDS: words if n.raised else 0,
        SCORES: 4 * n.texts * n.videos if n.keep_scores else 0,
        TRAVELLING: (min(2, n.ranks - 1) if n.exchange == "ring" else n.ranks > 1) * piece,
        OF_TRAVELLING: _under_way(n) * piece,
    }
    kept = Counter(parts)
    rows, columns = _last_tiles(n.texts, n.tile[0]), _last_tiles(n.videos_at_once, n.tile[1])
    for tile in product(rows, columns):
        yield from _streamed_tile(n, kept, *tile)
    yield "the end of a piece", kept + Counter({OF_WORDS: words, OF_FRAMES: 2 * piece})
    joined = {OF_WORDS: 2 * words, OF_FRAMES: n.frames_of(n.own_videos)}
    yield "the end of the tiles", kept + Counter(joined)
    yield from _end(n, n.own_videos)


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
        block = {TABLES: _tables(n, pairs), WORDS: n.words_of(texts)}
        yield "the backward of a tile", kept + of_words + of_frames + Counter(block)
        return
    tile = kept + of_frames + Counter({FRAMES: (2 if n.neighbour_frames else 0) * frames})
    before = tile + of_words + Counter({WORDS: n.packed(texts)})
    of_loss = {MAXIMA: n.maxima(pairs), SCORES: 4 * pairs, SCRATCH: LOSS_SCRATCH * pairs}
    yield "the loss's gradient in a tile", before + Counter(of_loss)
    after = tile + Counter({OF_WORDS: n.words_of(n.texts if later else row + texts)})
    yield from _of_sets(n, (texts, videos), before, after, of_scores=12)


def _under_way(n: Sizes) -> int:
    """Pieces of gradients that `exchange.Ring` holds while those of the next are computed."""
    if n.exchange != "ring" or n.ranks == 1:
        return 0
    # Leaving and arriving. With more than two ranks also those computed last, and the very first,
    # of which a lane keeps empty views as patterns.
    return 2 if n.ranks == 2 else 4


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
        OF_SCORES: 4 * (pairs - _looked_at(n)),
        SCRATCH: LOSS_SCRATCH * _looked_at(n),
    }
    yield "the loss's backward", kept + Counter(of_loss)
    yield "the backward of the maxima", kept + Counter({TABLES: _tables(n, pairs)})
    yield from _end(n, n.videos, masked_words=True)


def tiles(n: Sizes) -> Moments:
    """The torch backend: tiles of the reference, of which one at a time has its tables."""
    texts, videos = n.tile
    if (texts, videos) == (n.texts, n.videos):
        yield from naive(n)
        return
    pairs, words, frames = n.texts * n.videos, n.words_of(n.texts), n.frames_of(n.videos)
    kept = Counter({FRAMES: frames, WORDS: n.packed(n.texts) or (words if n.raised else 0)})
    of_loss = {
        SCORES: 4 * pairs,
        OF_SCORES: 4 * (pairs - _looked_at(n)),
        SCRATCH: LOSS_SCRATCH * _looked_at(n),
    }
    yield "the loss's backward", kept + Counter(of_loss)
    of_tile = {
        TABLES: _tables(n, texts * videos),
        WORDS: (2 if n.padded else 1) * n.words_of(texts),
        OF_SCORES: 4 * pairs,
        # Where lengths differ the longest texts come first, when no gradients are there.
        OF_WORDS: 0 if n.padded else words - n.words_of(texts),
        OF_FRAMES: 0 if n.padded else frames,
    }
    yield "the backward of a tile", kept + Counter(of_tile)
    yield from _end(n, n.videos, masked_words=True)


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


def _end(n: Sizes, videos: int, *, masked_words: bool = False) -> Moments:
    """From the gradients of what `reference.prepare` made to those of the features."""
    words, frames = n.words_of(n.texts), n.frames_of(videos)
    # The correlation of frames is a product of two: their gradients, and the sum with the first.
    of_frames = {FRAMES: frames, OF_FRAMES: 3 * frames} if n.neighbour_frames else {}
    yield "the end of the backward", Counter({OF_WORDS: words, OF_FRAMES: 2 * frames} | of_frames)
    if masked_words or n.raised:
        share = 1.0 if masked_words else n.bytes_per_number / 4
        parts = {OF_WORDS: words + int(share * words), OF_FRAMES: frames * n.bytes_per_number // 4}
        yield "the end of the backward", Counter(parts)


def _looked_at(n: Sizes) -> int:
    """Scores that the loss takes at once: whole rows."""
    at_once = SCORES_AT_ONCE if n.device == "cpu" else 16 * SCORES_AT_ONCE
    return min(n.texts, max(1, at_once // n.videos)) * n.videos


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
