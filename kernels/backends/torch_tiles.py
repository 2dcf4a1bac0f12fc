"""The engine in plain torch, on every device: a block of pairs in tiles of bounded scratch.

A tile is one matrix product and its maxima, whose places it keeps. In the backward the rows that a
token or frame met are added up by `embedding_bag`, which touches no other: L + F rows for a pair
where a dense product would take L x F. Texts are taken in order of length and cut to the longest of
their tile, so that padding costs little. Nothing in the loops waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tvr.kernels.backends.matmul import products
from tvr.kernels.backends.protocol import Gradients, Kept, Videos
from tvr.kernels.reference import NEIGHBOUR_FACTOR, FrameSet, TokenSet

# A tile of this many token-frame scores (16 MiB in float32, well within a large GPU's L2 cache)
# keeps matrix products large enough to run at full speed, and a few copies of it (scores, indices)
# are all that is ever alive. From 32 MiB on glibc would map a tile's pages anew every time.
SCORES_PER_TILE = 2**22
VIDEOS_PER_TEXT = 4


def chunk_size(texts: tuple[TokenSet, ...], videos: FrameSet) -> int:
    """Texts per tile such that chunk x 4 chunk pairs hold at most `SCORES_PER_TILE` scores."""
    scores_per_pair = max(tokens.weights.shape[1] for tokens in texts) * videos.weights.shape[1]
    return max(1, math.isqrt(SCORES_PER_TILE // (VIDEOS_PER_TEXT * scores_per_pair)))


@dataclass(frozen=True)
class Tiles:
    """`set_similarity.Engine` in tiles of `chunk` texts x 4 `chunk` videos.

    `fast`: the products are of features rounded to bfloat16 (see `similarity.dmae_similarity`).
    """

    chunk: int
    fast: bool = False

    def scores(self, text: TokenSet, videos: Videos, *, keep: bool) -> tuple[Tensor, Kept]:
        result = text.weights.new_empty(len(text.weights), len(videos.frames))
        kept: list[Tensor | None] = [*text]
        for tile in _text_tiles(text.valid, self.chunk):
            some = tile.of(text)
            for columns in self._columns(videos):
                scores, *places = _meet(some, videos.part(columns), self.fast)
                result[tile.texts, columns] = scores
                if keep:
                    kept += places
        return result, tuple(kept)

    def gradients(self, gradient: Float[Tensor, "A C"], kept: Kept, videos: Videos) -> Gradients:
        tokens, weights, valid, *places = kept
        assert tokens is not None
        assert weights is not None
        assert valid is not None
        text = TokenSet(tokens, weights, valid)
        of_tokens, of_weights = torch.zeros_like(tokens), torch.zeros_like(weights)
        of_videos = _zeros(videos)
        following = iter(places)
        for tile in _text_tiles(valid, self.chunk):
            some = tile.of(text)
            own, met = torch.zeros_like(some.tokens), torch.zeros_like(some.tokens)
            for columns in self._columns(videos):
                factors = gradient[tile.texts, columns] / 2
                part, to = videos.part(columns), of_videos.part(columns)
                _of_best_frames(some, part, factors, next(following), own, to)
                _of_best_tokens(some, part, factors, next(following), met, to)
            of_weights[tile.texts, : tile.slots] = (own * some.tokens).sum(dim=2)
            own *= some.weights[..., None]
            own += met.masked_fill_(~some.valid[..., None], 0)
            of_tokens[tile.texts, : tile.slots] = own
        return Gradients(
            of_tokens, of_weights, of_videos.frames, of_videos.weights, of_videos.boosted
        )

    def _columns(self, videos: Videos) -> Iterator[slice]:
        size = VIDEOS_PER_TEXT * self.chunk
        for first in range(0, len(videos.frames), size):
            yield slice(first, first + size)


def _meet(texts: TokenSet, videos: Videos, fast: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """SIM (n, m) of a tile, and the places (n, L, m) and (n, F, m) of its maxima."""
    num_texts, slots = texts.weights.shape
    num_videos, num_frames = videos.frames.shape[:2]
    scores = products(texts.tokens.flatten(0, 1), videos.frames.flatten(0, 1), fast=fast)
    scores = scores.view(num_texts, slots, num_videos, num_frames)
    best, best_frame = scores.max(dim=3)
    if videos.strength is not None and videos.neighbour is not None:
        place = best_frame[..., None]
        strength = videos.strength.expand_as(scores).gather(3, place)
        neighbour = videos.neighbour.expand_as(scores).gather(3, place)
        related = strength * scores.gather(3, neighbour)
        best = torch.add(best, related.squeeze(3), alpha=NEIGHBOUR_FACTOR)
    total = torch.einsum("al,alm->am", texts.weights, best)
    best_token = None
    if videos.weights is not None:
        best, best_token = scores.max(dim=1)
        total += torch.einsum("mf,amf->am", videos.weights, best)
        best_token = _small(best_token.transpose(1, 2), slots)
    return total / 2, _small(best_frame, num_frames), best_token


def _of_best_frames(
    texts: TokenSet, videos: Videos, factors: Tensor, places: Tensor | None, own: Tensor, to: Videos
) -> None:
    """What goes back from p: to the tokens (before their weights), and to the frames they met."""
    assert places is not None
    num_videos, num_frames = videos.frames.shape[:2]
    first_frame = num_frames * torch.arange(num_videos, dtype=torch.int32, device=places.device)
    boosted, to_frames = (x.frames if x.boosted is None else x.boosted for x in (videos, to))
    of_tokens, of_frames = _sums(
        (places + first_frame).flatten(0, 1),
        factors[:, None].expand(places.shape).flatten(0, 1),
        chosen=boosted.flatten(0, 1),
        choosers=(texts.tokens * texts.weights[..., None]).flatten(0, 1),
    )
    own += of_tokens.view_as(own)
    to_frames += of_frames.view_as(to_frames)


def _of_best_tokens(
    texts: TokenSet, videos: Videos, factors: Tensor, places: Tensor | None, met: Tensor, to: Videos
) -> None:
    """What goes back from q: to the frames, their weights, and the tokens that they met."""
    if places is None or videos.weights is None or to.weights is None:
        return
    num_texts, slots = texts.weights.shape
    first_token = slots * torch.arange(num_texts, dtype=torch.int32, device=places.device)
    # (m, F, n): the maxima of a frame side by side.
    rows = places.permute(2, 1, 0) + first_token
    of_frames, of_tokens = _sums(
        rows.flatten(0, 1),
        factors.T[:, None].expand(rows.shape).flatten(0, 1),
        chosen=texts.tokens.flatten(0, 1),
        choosers=(videos.frames * videos.weights[..., None]).flatten(0, 1),
    )
    of_frames = of_frames.view_as(videos.frames)
    to.weights.add_((of_frames * videos.frames).sum(dim=2))
    to.frames.add_(of_frames * videos.weights[..., None])
    met += of_tokens.view_as(met)


def _sums(
    rows: Int[Tensor, "S E"],
    factors: Float[Tensor, "S E"],
    *,
    chosen: Float[Tensor, "R D"],
    choosers: Float[Tensor, "S D"],
) -> tuple[Float[Tensor, "S D"], Float[Tensor, "R D"]]:
    """Slot s chose the rows `rows`[s] of `chosen`: what each slot chose, and who chose each row.

    sum_e factors[s, e] chosen[rows[s, e]], and the sum of factors[s, e] choosers[s] where
    rows[s, e] = r; both in a fixed order.
    """
    num_slots, entries = rows.shape
    flat, factors = rows.flatten(), factors.flatten()
    starts = torch.arange(num_slots, dtype=flat.dtype, device=flat.device) * entries
    own = F.embedding_bag(flat, chosen, starts, mode="sum", per_sample_weights=factors)
    # 16 bits, where they suffice, are sorted faster.
    narrow = torch.int16 if len(chosen) < 2**15 else torch.int32
    ordered, order = flat.to(narrow).sort(stable=True)
    bounds = torch.arange(len(chosen), dtype=narrow, device=flat.device)
    starts = torch.searchsorted(ordered, bounds, out_int32=True)
    slots = torch.div(order.to(torch.int32), entries, rounding_mode="floor")
    met = F.embedding_bag(slots, choosers, starts, mode="sum", per_sample_weights=factors[order])
    return own, met


def _zeros(videos: Videos) -> Videos:
    """For the gradients of frames, weights and boosted frames."""
    weights, boosted = (
        None if x is None else torch.zeros_like(x) for x in (videos.weights, videos.boosted)
    )
    return Videos(torch.zeros_like(videos.frames), weights, boosted, None, None)


def _small(places: Tensor, slots: int) -> Tensor:
    """As small a type as holds them, laid out as given."""
    dtype = torch.uint8 if slots <= 2**8 else torch.int16 if slots <= 2**15 else torch.int32
    return places.to(dtype, memory_format=torch.contiguous_format)


class _TextTile(NamedTuple):
    """Which texts, and to how many slots they are cut."""

    texts: slice | Tensor
    slots: int

    def of(self, text: TokenSet) -> TokenSet:
        """Their tokens, zero vectors where there is none."""
        some = TokenSet(*(x[self.texts, : self.slots] for x in text))
        # A slice: all texts are full, and nothing is copied.
        return (
            some if isinstance(self.texts, slice) else some._replace(tokens=some.without_padding())
        )


def _text_tiles(valid: Tensor, size: int) -> list[_TextTile]:
    """In order of length. The lengths are the only values that the host fetches."""
    num_texts, slots = valid.shape
    starts = range(0, num_texts, size)
    # One slot of padding counts as similarity 0; more of them change nothing.
    ends = (valid * torch.arange(1, slots + 1, device=valid.device)).amax(dim=1)
    kept = (ends + 1).clamp_max(slots)
    holes = bool((valid.sum(dim=1) < slots).any())
    if not holes:
        return [_TextTile(slice(start, start + size), slots) for start in starts]
    kept, order = kept.sort(stable=True)
    longest = kept[[min(start + size, num_texts) - 1 for start in starts]].tolist()
    return [
        _TextTile(texts, slots) for texts, slots in zip(order.split(size), longest, strict=True)
    ]
