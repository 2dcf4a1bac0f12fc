"""Similarity backend in plain torch, for every device: a block of pairs in tiles of bounded size.

Forward: one matrix product gives a tile's token-frame scores; their maxima over frames and over
tokens give SIM, and the indices of the maxima are saved. Backward: a weighted gather and its
transpose, both as `embedding_bag`, touch L + F feature rows per pair where dense products would
touch L x F. Texts are sorted by length and cut to the longest of their tile, so that padding costs
little. Their lengths are known to the host (`TokenSet.lengths`), which never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from tvr.kernels.backends.matmul import inner_products
from tvr.kernels.backends.protocol import InputGradients, SavedTensors, VideoTensors
from tvr.kernels.device_transfer import to_host
from tvr.kernels.text_lengths import TextLengths, lengths_of
from tvr.kernels.token_sets import NEIGHBOUR_FACTOR, FrameSet, TokenSet

# 16 MiB of token-frame scores in float32, well within a large GPU's L2 cache: large enough for
# matrix products at full speed, and only a few tensors of this size (scores, indices) are allocated
# at a time. From 32 MiB on, glibc would map fresh pages for every tile.
SCORES_PER_TILE = 2**22
VIDEOS_PER_TEXT = 4


def texts_per_tile(texts: tuple[TokenSet, ...], videos: FrameSet) -> int:
    """Largest n such that a tile of n texts x 4 n videos has at most `SCORES_PER_TILE` scores."""
    scores_per_pair = max(tokens.weights.shape[1] for tokens in texts) * videos.frames.shape[1]
    return max(1, math.isqrt(SCORES_PER_TILE // (VIDEOS_PER_TEXT * scores_per_pair)))


@dataclass(frozen=True)
class TorchTiles:
    """`SimilarityBackend` in tiles of `chunk` texts x 4 `chunk` videos."""

    chunk: int
    fast: bool = False
    """Rounds the features of the products to bfloat16; see `similarity.dmae_similarity`."""
    reads_boosted: ClassVar[bool] = True

    def forward(
        self, text: TokenSet, videos: VideoTensors, *, save: bool
    ) -> tuple[Tensor, SavedTensors]:
        result = text.weights.new_empty(len(text.weights), len(videos.frames))
        saved: list[Tensor | None] = [*text.tensors]
        for tile in text_tiles(text, self.chunk):
            tile_text = tile.select(text)
            for columns in self._columns(videos):
                scores, *indices = _score_tile(tile_text, videos.part(columns), self.fast)
                result[tile.texts, columns] = scores
                if save:
                    saved += indices
        return result, tuple(saved)

    def backward(
        self,
        gradient: Float[Tensor, "A C"],
        saved: SavedTensors,
        videos: VideoTensors,
        lengths: TextLengths | None,
    ) -> InputGradients:
        text, indices = split_saved(saved, lengths)
        d_tokens, d_weights = torch.zeros_like(text.tokens), torch.zeros_like(text.weights)
        d_videos = _zero_gradients(videos)
        remaining = iter(indices)
        for tile in text_tiles(text, self.chunk):
            tile_text = tile.select(text)
            # Gradients of the tokens as p sees them, before their weights, and as q sees them.
            d_p = torch.zeros_like(tile_text.tokens)
            d_q = None if videos.weights is None else torch.zeros_like(d_p)
            for columns in self._columns(videos):
                factors = gradient[tile.texts, columns] / 2
                tile_videos, d_tile_videos = videos.part(columns), d_videos.part(columns)
                best_frame, best_token = next(remaining), next(remaining)
                _frame_max_backward(tile_text, tile_videos, factors, best_frame, d_p, d_tile_videos)
                _token_max_backward(tile_text, tile_videos, factors, best_token, d_q, d_tile_videos)
            d_weights[tile.texts, : tile.slots] = (d_p * tile_text.tokens).sum(dim=2)
            d_p *= tile_text.weights[..., None]
            if d_q is not None:
                d_p += d_q.masked_fill_(~tile_text.valid[..., None], 0)
            d_tokens[tile.texts, : tile.slots] = d_p
        return InputGradients(
            d_tokens, d_weights, d_videos.frames, d_videos.weights, d_videos.boosted
        )

    def _columns(self, videos: VideoTensors) -> Iterator[slice]:
        size = VIDEOS_PER_TEXT * self.chunk
        for first in range(0, len(videos.frames), size):
            yield slice(first, first + size)


def _score_tile(
    texts: TokenSet, videos: VideoTensors, fast: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """SIM (n, m) of a tile, best frames (n, L, m) and best tokens (n, F, m)."""
    num_texts, slots = texts.weights.shape
    num_videos, num_frames = videos.frames.shape[:2]
    scores = inner_products(texts.tokens.flatten(0, 1), videos.frames.flatten(0, 1), fast=fast)
    scores = scores.view(num_texts, slots, num_videos, num_frames)
    best, best_frame = scores.max(dim=3)
    if videos.strength is not None and videos.neighbour is not None:
        index = best_frame[..., None]
        strength = videos.strength.expand_as(scores).gather(3, index)
        neighbour = videos.neighbour.expand_as(scores).gather(3, index)
        related = strength * scores.gather(3, neighbour)
        best = torch.add(best, related.squeeze(3), alpha=NEIGHBOUR_FACTOR)
    total = torch.einsum("al,alm->am", texts.weights, best)
    best_token = None
    if videos.weights is not None:
        best, best_token = scores.max(dim=1)
        total += torch.einsum("mf,amf->am", videos.weights, best)
        best_token = _smallest_integers(best_token.transpose(1, 2), slots)
    return total / 2, _smallest_integers(best_frame, num_frames), best_token


def _frame_max_backward(
    texts: TokenSet,
    videos: VideoTensors,
    factors: Float[Tensor, "n m"],
    best_frame: Integer[Tensor, "n L m"] | None,
    d_tokens: Float[Tensor, "n L D"],
    d_videos: VideoTensors,
) -> None:
    """Backward of p, the max over frames: adds to the gradients of the unweighted tokens and of the
    selected frames."""
    assert best_frame is not None
    num_videos, num_frames = videos.frames.shape[:2]
    first_frame = num_frames * torch.arange(num_videos, dtype=torch.int32, device=factors.device)
    frames, d_frames = (x.frames if x.boosted is None else x.boosted for x in (videos, d_videos))
    gathered, scattered = _gather_and_scatter(
        (best_frame + first_frame).flatten(0, 1),
        factors[:, None].expand(best_frame.shape).flatten(0, 1),
        table=frames.flatten(0, 1),
        values=(texts.tokens * texts.weights[..., None]).flatten(0, 1),
    )
    d_tokens += gathered.view_as(d_tokens)
    d_frames += scattered.view_as(d_frames)


def _token_max_backward(
    texts: TokenSet,
    videos: VideoTensors,
    factors: Float[Tensor, "n m"],
    best_token: Integer[Tensor, "n F m"] | None,
    d_tokens: Float[Tensor, "n L D"] | None,
    d_videos: VideoTensors,
) -> None:
    """Backward of q, the max over tokens: adds to the gradients of the frames, of their weights and
    of the selected tokens."""
    if best_token is None or videos.weights is None or d_videos.weights is None or d_tokens is None:
        return
    num_texts, slots = texts.weights.shape
    first_token = slots * torch.arange(num_texts, dtype=torch.int32, device=factors.device)
    # (m, F, n): the maxima of a frame are contiguous.
    rows = best_token.permute(2, 1, 0) + first_token
    gathered, scattered = _gather_and_scatter(
        rows.flatten(0, 1),
        factors.T[:, None].expand(rows.shape).flatten(0, 1),
        table=texts.tokens.flatten(0, 1),
        values=(videos.frames * videos.weights[..., None]).flatten(0, 1),
    )
    d_frames = gathered.view_as(videos.frames)
    d_videos.weights.add_((d_frames * videos.frames).sum(dim=2))
    d_videos.frames.add_(d_frames * videos.weights[..., None])
    d_tokens += scattered.view_as(d_tokens)


def _gather_and_scatter(
    rows: Int[Tensor, "S E"],
    factors: Float[Tensor, "S E"],
    *,
    table: Float[Tensor, "R D"],
    values: Float[Tensor, "S D"],
) -> tuple[Float[Tensor, "S D"], Float[Tensor, "R D"]]:
    """Weighted gather from `table`, and its transpose (scatter-add of `values`).

    Both sums run in a fixed order.

    Args:
        rows: Row of the table that each of a slot's E maxima selected.
        factors: Weight of each maximum.

    Returns:
        sum_e factors[s, e] table[rows[s, e]] for every slot s; and for every row r, the sum of
        factors[s, e] values[s] over all (s, e) with rows[s, e] = r.
    """
    num_slots, entries = rows.shape
    flat, factors = rows.flatten(), factors.flatten()
    starts = torch.arange(num_slots, dtype=flat.dtype, device=flat.device) * entries
    gathered = F.embedding_bag(flat, table, starts, mode="sum", per_sample_weights=factors)
    # 16-bit integers, where they suffice, sort faster.
    narrow = torch.int16 if len(table) < 2**15 else torch.int32
    ordered, order = flat.to(narrow).sort(stable=True)
    bounds = torch.arange(len(table), dtype=narrow, device=flat.device)
    starts = torch.searchsorted(ordered, bounds, out_int32=True)
    slots = torch.div(order.to(torch.int32), entries, rounding_mode="floor")
    scattered = F.embedding_bag(
        slots, values, starts, mode="sum", per_sample_weights=factors[order]
    )
    return gathered, scattered


def _zero_gradients(videos: VideoTensors) -> VideoTensors:
    """Zeros for the gradients of frames, weights and boosted frames."""
    weights, boosted = (
        None if x is None else torch.zeros_like(x) for x in (videos.weights, videos.boosted)
    )
    return VideoTensors(torch.zeros_like(videos.frames), weights, boosted, None, None)


def _smallest_integers(indices: Tensor, size: int) -> Tensor:
    """Indices below `size` in the smallest integer type that holds them, contiguous."""
    dtype = torch.uint8 if size <= 2**8 else torch.int16 if size <= 2**15 else torch.int32
    return indices.to(dtype, memory_format=torch.contiguous_format)


def split_saved(saved: SavedTensors, lengths: TextLengths | None) -> tuple[TokenSet, SavedTensors]:
    """The token set that the forward has saved first, and what it has saved behind it."""
    tokens, weights, valid, *others = saved
    assert tokens is not None
    assert weights is not None
    assert valid is not None
    return TokenSet(tokens, weights, valid, lengths), tuple(others)


class TextTile(NamedTuple):
    """Texts of a tile, and the number of slots that their tokens are cut to."""

    texts: slice | Tensor
    slots: int

    def select(self, text: TokenSet) -> TokenSet:
        """The tile's part of a token set, with zero vectors in padded slots."""
        tokens, weights, valid = (x[self.texts, : self.slots] for x in text.tensors)
        part = TokenSet(tokens, weights, valid)
        # A slice means that no text has padding; then nothing is copied.
        return (
            part if isinstance(self.texts, slice) else part._replace(tokens=part.without_padding())
        )


def text_tiles(text: TokenSet, size: int) -> list[TextTile]:
    """Tiles of `size` texts, sorted by length where some have padding.

    The tensor of each tile's texts comes from the device, and the number of slots from the host's
    `lengths`, so nothing is read from the device.
    """
    num_texts, slots = text.valid.shape
    starts = range(0, num_texts, size)
    lengths = text.lengths or lengths_of(to_host(text.valid, "masks"))
    if all(count == slots for count in lengths.counts):
        return [TextTile(slice(start, start + size), slots) for start in starts]
    # One padded slot is kept, because it counts as similarity 0; more of them change nothing.
    ends = (text.valid * torch.arange(1, slots + 1, device=text.valid.device)).amax(dim=1)
    order = (ends + 1).clamp_max(slots).sort(stable=True).indices
    in_order = sorted(min(end + 1, slots) for end in lengths.ends)
    longest = [in_order[min(start + size, num_texts) - 1] for start in starts]
    return [TextTile(texts, slots) for texts, slots in zip(order.split(size), longest, strict=True)]
