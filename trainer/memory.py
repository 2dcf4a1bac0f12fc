"""Memory of the similarity and its loss on one rank, counted from sizes alone.

Each estimate lists what is alive at the moments that can be the peak, and takes the largest. The
letters are those of `kernels.reference`; the features' own encoders and TPM-CL are not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tvr.kernels.losses import SCORES_AT_ONCE
from tvr.kernels.similarity import PAIRS_PER_TILE
from tvr.kernels.tiles import SCORES_PER_TILE, VIDEOS_PER_TEXT

# Of `row_loss.gradient` at its widest, for each score looked at: 7 numbers and 5 truth values.
LOSS_SCRATCH = 7 * 4 + 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What memory depends on: B `texts` of this rank, G `videos` of all ranks, and the ways taken.

    `backend` is "compiled", "torch", or "naive" (the reference). `bytes_per_number` is that of the
    features. `word_share` is the part of the word slots that holds a word; 1: no padding at all.
    """

    texts: int
    videos: int
    words: int
    frames: int
    width: int
    interaction: str = "att_wti"
    neighbour_frames: bool = True
    backend: str = "compiled"
    exchange: str = "gather"
    scores: str = "keep"
    chunk: int | None = None
    bytes_per_number: int = 4
    word_share: float = 1.0
    device: str = "cpu"

    @property
    def slots(self) -> int:
        """Tokens of a text in the largest token set."""
        return self.words if self.interaction.startswith("att_") else 1

    @property
    def numbers_of_words(self) -> int:
        """Of the words of this rank's texts; the sentence alone needs none."""
        return self.texts * self.words * self.width if self.slots > 1 else 0

    def numbers_of_frames(self, videos: int) -> int:
        return videos * self.frames * self.width

    @property
    def tile(self) -> tuple[int, int]:
        """Texts and videos of a tile, of the torch backend or of streamed scores."""
        chunk = self.chunk
        if self.backend == "naive":
            return self.texts, self.videos
        if chunk is None and self.backend == "compiled":
            chunk = math.isqrt(PAIRS_PER_TILE // VIDEOS_PER_TEXT)
        elif chunk is None:
            of_pair = VIDEOS_PER_TEXT * self.slots * self.frames
            chunk = max(1, math.isqrt(SCORES_PER_TILE // of_pair))
        return min(chunk, self.texts), min(VIDEOS_PER_TEXT * chunk, self.videos)


@dataclass(frozen=True, slots=True)
class Estimate:
    """The peak in bytes: when it is reached, and what is alive then, by name."""

    moment: str
    parts: dict[str, int]
    inputs: int
    """Bytes of the features themselves, which are there before; not among the parts."""

    @property
    def above_inputs(self) -> int:
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        return self.inputs + self.above_inputs


def estimate(sizes: Sizes) -> Estimate:
    """Peak of one forward and backward, similarity and loss, on one rank."""
    inputs = sizes.bytes_per_number * (
        sizes.texts * sizes.width + sizes.numbers_of_words + sizes.numbers_of_frames(sizes.texts)
    )
    inputs += 8 * (sizes.texts * sizes.words + sizes.texts * sizes.frames)
    if sizes.scores == "stream" or sizes.exchange == "ring":
        moments = _streamed(sizes)
    elif sizes.backend == "compiled":
        moments = _compiled(sizes)
    else:
        moments = _tiled(sizes)
    moment, parts = max(moments, key=lambda found: sum(found[1].values()))
    return Estimate(moment, {name: size for name, size in parts.items() if size}, inputs)


Moments = Iterator[tuple[str, dict[str, int]]]


def _compiled(n: Sizes) -> Moments:
    """The compiled similarity of all pairs, then the loss of its scores."""
    pairs, videos = n.texts * n.videos, 4 * n.numbers_of_frames(n.videos)
    tables = _tables(n) + _copies(n, n.videos)
    words, packed = 4 * n.numbers_of_words, _packed_words(n)
    of_sentence = pairs  # the place of the sentence's best frame
    of_words = int(n.word_share * n.words * pairs) + n.frames * pairs if n.slots > 1 else 0
    kept = {"copies of the frames, kept": tables, "copies of the words, kept": packed}
    yield (
        "the loss's backward",
        {
            **kept,
            "places of the maxima": of_sentence + of_words,
            "scores": 4 * pairs,
            "gradient of the scores": 4 * pairs,
            "scratch of the loss": LOSS_SCRATCH * _looked_at(n),
        },
    )
    sides = 2 if n.neighbour_frames else 1  # frames as met by words, and as met with neighbours
    unpacked = words if n.word_share < 1 else 0
    yield (
        "the backward of the words" if n.slots > 1 else "the backward of the sentence",
        {
            **kept,
            "places of the maxima": of_sentence + of_words,
            "gradient of the scores": 8 * pairs,
            "gradients of the words": int(n.word_share * words) + unpacked,
            "gradients of the frames": sides * videos,
        },
    )
    if n.slots > 1:
        yield (
            "the backward of the sentence",
            {
                "copies of the frames, kept": tables,
                "places of the maxima": of_sentence,
                "gradient of the scores": 8 * pairs,
                "gradients of the words": _gradient(n, n.numbers_of_words),
                "gradients of the frames": 2 * sides * videos,
            },
        )


def _tiled(n: Sizes) -> Moments:
    """Tiles of the reference, of which one is computed and differentiated at a time."""
    pairs, videos = n.texts * n.videos, 4 * n.numbers_of_frames(n.videos)
    words = 4 * n.numbers_of_words
    tile_texts, tile_videos = n.tile
    one = (tile_texts, tile_videos) == (n.texts, n.videos)
    raised = words if n.bytes_per_number < 4 else 0
    kept = {
        "copies of the frames, kept": videos + _tables(n),
        "copies of the words, kept": raised,
    }
    yield (
        "the loss's backward",
        {
            **kept,
            "scores": 4 * pairs,
            "gradient of the scores": 4 * pairs,
            "scratch of the loss": LOSS_SCRATCH * _looked_at(n),
            "token-frame tables": _block(n, pairs, saved=True) + words if one else 0,
        },
    )
    yield (
        "the backward of a tile",
        {
            **kept,
            "gradient of the scores": 4 * pairs,
            "gradients of the words": 0 if one else words,
            "gradients of the frames": 0 if one else videos,
            "token-frame tables": _block(n, tile_texts * tile_videos)
            + words * tile_texts // n.texts,
        },
    )
    yield (
        "the end of the backward",
        {
            **kept,
            "gradients of the words": 2 * words,
            "gradients of the frames": 2 * videos,
        },
    )


def _streamed(n: Sizes) -> Moments:
    """Tiles of scores that are forgotten at once, while the videos pass by in pieces."""
    tile_texts, tile_videos = n.tile
    own = 4 * n.numbers_of_frames(n.texts)
    ranks = -(-n.videos // n.texts)
    in_piece = n.texts if n.exchange == "ring" else n.videos
    tile_videos = min(tile_videos, in_piece)
    piece, of_tile = (4 * n.numbers_of_frames(x) for x in (in_piece, tile_videos))
    words = 4 * n.numbers_of_words
    text_tiles = -(-n.texts // tile_texts)
    in_tile = tile_texts * tile_videos
    kept = {
        "copies of the frames, kept": own + _tables(n),
        "copies of the words, kept": words if n.bytes_per_number < 4 else 0,
        "scores": 4 * n.texts * n.videos if n.scores == "keep" else 0,
        "frames of other ranks": _travelling(n, ranks, piece),
        "gradients that travel": min(2, ranks) * piece if n.exchange == "ring" and ranks > 1 else 0,
    }
    # The last tile: all others have left their gradients.
    left = {"gradients of the words": words, "gradients of the frames": piece}
    if n.backend == "compiled":
        packed = _packed_words(n) * tile_texts // n.texts
        sides = 2 if n.neighbour_frames else 1
        copies = of_tile * (sides if n.neighbour_frames else 0)
        maxima = in_tile * (1 + (int(n.word_share * n.words) + n.frames if n.slots > 1 else 0))
        yield (
            "the loss's gradient in a tile",
            {**kept, **left, "tile": copies + packed + maxima + (LOSS_SCRATCH + 4) * in_tile},
        )
        of_words = words * tile_texts // n.texts
        moving = int(n.word_share * of_words) + (of_words if n.word_share < 1 else 0)
        yield (
            "the backward of the words in a tile",
            {**kept, **left, "tile": copies + packed + maxima + 8 * in_tile + moving}
            | {"gradients of the frames": piece + sides * of_tile},
        )
        yield (
            "the backward of the sentence in a tile",
            {**kept, **left, "tile": copies + 9 * in_tile + 2 * sides * of_tile}
            | ({"gradients of the words": words * (text_tiles + 1) // text_tiles}),
        )
    else:
        yield (
            "the backward of a tile",
            {**kept, **left, "tile": _block(n, in_tile) + words * tile_texts // n.texts},
        )
    yield (
        "the end of a piece",
        {**kept, "gradients of the words": words, "gradients of the frames": 2 * piece},
    )
    yield (
        "the end of the backward",
        {**kept, "gradients of the words": 2 * words, "gradients of the frames": own},
    )


def _tables(n: Sizes) -> int:
    """Masks, weights, neighbours: some numbers for each slot."""
    return 24 * n.texts * n.words + 40 * n.videos * n.frames


def _copies(n: Sizes, videos: int) -> int:
    """Frames without padding and, for their neighbours, those found and the sums with them."""
    return 4 * n.numbers_of_frames(videos) * (3 if n.neighbour_frames else 1)


def _packed_words(n: Sizes) -> int:
    """A copy of the words without padding, or one of a wider type; else the features serve."""
    if n.word_share < 1 or n.bytes_per_number < 4:
        return int(n.word_share * 4 * n.numbers_of_words)
    return 0


def _gradient(n: Sizes, numbers: int) -> int:
    """A gradient in float32, and once more in the features' own type where that is another."""
    return numbers * (4 if n.bytes_per_number >= 4 else 4 + n.bytes_per_number)


def _looked_at(n: Sizes) -> int:
    """Scores that the loss takes at once: whole rows."""
    at_once = SCORES_AT_ONCE if n.device == "cpu" else 16 * SCORES_AT_ONCE
    return min(n.texts, max(1, at_once // n.videos)) * n.videos


def _block(n: Sizes, pairs: int, *, saved: bool = False) -> int:
    """The reference's tables of that many pairs; `saved`: those kept for the backward alone."""
    tables = 0 if saved else 8 * n.slots * n.frames
    return pairs * (tables + 28 * n.slots + 24 * n.frames + 40)


def _travelling(n: Sizes, ranks: int, piece: int) -> int:
    """Frames beside this rank's own: all ranks', or a ring's two pieces."""
    if ranks == 1:
        return 0
    return min(2, ranks - 1) * piece if n.exchange == "ring" else piece
