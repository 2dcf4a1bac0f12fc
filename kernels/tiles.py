"""The similarity in plain torch, on every device: checkpointed tiles of the reference.

A tile's insides are computed anew in the backward, so memory grows as A x C and never as
A x T x C x F. Texts are taken in order of length and cut to the longest of their tile, so that
padding costs little. Nothing in the loop waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tvr.kernels.reference import FrameSet, TokenSet, block_similarity

# A tile of this many token-frame scores (32 MiB in float32, about a large GPU's L2 cache) keeps
# matrix products large enough to run at full speed, and a few copies of it (scores, indices,
# gradients) are all that is ever alive.
SCORES_PER_TILE = 2**23
VIDEOS_PER_TEXT = 4


def chunk_size(texts: tuple[TokenSet, ...], videos: FrameSet) -> int:
    """Texts per tile such that chunk x 4 chunk pairs hold at most `SCORES_PER_TILE` scores."""
    scores_per_pair = max(tokens.weights.shape[1] for tokens in texts) * videos.weights.shape[1]
    return max(1, math.isqrt(SCORES_PER_TILE // (VIDEOS_PER_TEXT * scores_per_pair)))


def tiled_similarity(
    texts: tuple[TokenSet, ...], videos: FrameSet, chunk: int
) -> Float[Tensor, "A C"]:
    """`reference.block_similarity` in tiles of `chunk` texts x 4 `chunk` videos."""
    num_texts, num_videos = texts[0].weights.shape[0], videos.weights.shape[0]
    if num_texts <= chunk and num_videos <= VIDEOS_PER_TEXT * chunk:
        # One tile must be alive in the backward anyway: computing it twice would save nothing.
        return block_similarity(texts, videos)
    video_tiles = _split_videos(videos, VIDEOS_PER_TEXT * chunk)
    order, text_tiles = _split_texts(texts, chunk)
    rows = []
    for text_tile in text_tiles:
        tiles = [
            checkpoint(_score, text_tile, video, use_reentrant=False, preserve_rng_state=False)
            for video in video_tiles
        ]
        rows.append(torch.cat(tiles, dim=1))
    scores = torch.cat(rows)
    return scores if order is None else scores[order.argsort()]


class _Packed(NamedTuple):
    """Valid tokens of some texts, one after another, and where they stand among n x L slots."""

    tokens: Float[Tensor, "R D"]
    weights: Float[Tensor, " R"]
    places: Int[Tensor, " R"]
    num_texts: int
    slots: int

    def unpacked(self) -> TokenSet:
        size = self.num_texts * self.slots
        tokens = self.tokens.new_zeros(size, self.tokens.shape[1])
        tokens = tokens.index_copy(0, self.places, self.tokens)
        weights = self.weights.new_zeros(size).index_copy(0, self.places, self.weights)
        # Padding holds zero vectors already: nothing is left to be masked.
        valid = torch.ones_like(weights, dtype=torch.bool)
        shape = (self.num_texts, self.slots)
        return TokenSet(*(x.unflatten(0, shape) for x in (tokens, weights, valid)))


def _score(texts: tuple[TokenSet | _Packed, ...], videos: FrameSet) -> Float[Tensor, "n m"]:
    sets = (x.unpacked() if isinstance(x, _Packed) else x for x in texts)
    return block_similarity(tuple(sets), videos)


# split, not slices: the backward of a slice fills a zero tensor of the whole size for every tile,
# that of a split joins the parts once.
def _split_texts(
    texts: tuple[TokenSet, ...], size: int
) -> tuple[Tensor | None, Iterator[tuple[TokenSet | _Packed, ...]]]:
    """The order in which texts are taken (None: as they stand), and their tiles."""
    lengths = torch.stack([_kept_slots(tokens.valid) for tokens in texts]).amax(dim=0)
    slots = max(tokens.valid.shape[1] for tokens in texts)
    if bool((lengths == slots).all()):
        plain = [zip(*(x.split(size) for x in tokens), strict=True) for tokens in texts]
        return None, zip(*([TokenSet(*p) for p in parts] for parts in plain), strict=True)
    order = lengths.argsort(stable=True)
    return order, zip(*(_packed_tiles(x, order, lengths, size) for x in texts), strict=True)


def _kept_slots(valid: Tensor) -> Int[Tensor, " A"]:
    """Slots of each text up to its last token, and one of its padding, which counts as 0."""
    slots = valid.shape[1]
    last = (valid * torch.arange(1, slots + 1, device=valid.device)).amax(dim=1)
    return (last + 1).clamp_max(slots)


def _packed_tiles(tokens: TokenSet, order: Tensor, lengths: Tensor, size: int) -> list[_Packed]:
    valid = tokens.valid[order]
    row, slot = valid.nonzero(as_tuple=True)
    flat = order[row] * valid.shape[1] + slot
    # The only values that the host needs, fetched before the loop.
    starts = [*range(0, len(order), size), len(order)]
    counts, lengths = valid.sum(dim=1).tolist(), lengths[order].tolist()
    of_tile = [sum(counts[a:b]) for a, b in pairwise(starts)]
    longest = [min(max(lengths[a:b]), valid.shape[1]) for a, b in pairwise(starts)]
    packed = (tokens.tokens.flatten(0, 1)[flat], tokens.weights.flatten()[flat], row, slot)
    parts = zip(*(x.split(of_tile) for x in packed), pairwise(starts), longest, strict=True)
    return [
        _Packed(x, weights, (row - a) * slots + slot, b - a, slots)
        for x, weights, row, slot, (a, b), slots in parts
    ]


def _split_videos(videos: FrameSet, size: int) -> list[FrameSet]:
    frames, weights = videos.frames.split(size), videos.weights.split(size)
    tables = [
        [None] * len(frames) if table is None else table.split(size)
        for table in (videos.strength, videos.neighbour)
    ]
    return [FrameSet(*part) for part in zip(frames, weights, *tables, strict=True)]
