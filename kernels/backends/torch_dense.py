"""Similarity backend made for tensor cores: a backward of dense matrix products, in plain torch.

The forward of a tile is one matrix product and the maxima of its scores. The backward computes the
scores again instead of saving indices. Each maximum writes its share of the gradient, at the score
that it selected, into a coefficient matrix S of (words of the tile) x (frames of the tile), and

    gradient of the words = S x frames          gradient of the frames = S^T x words

With neighbour frames, p = S[j] + 0.5 r S[n] has two entries. Sparse row sums (`torch_tiles`) do
L x F / (L + F) times fewer operations, about 9 times fewer for 32 words and 12 frames, but read and
write a row of D numbers for each; here a tile's operands are read once. So the dense form is for
devices whose matrix units are far ahead of their memory.

Every row of a gradient is summed by one loop, in the order of the tiles, without atomic operations:
results repeat bit for bit on the same device. Bounds of the loops are Python integers; the host
reads nothing from the device in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvr.kernels.backends.matmul import (
    Parts,
    inner_products,
    parts,
    product_of_parts,
    split_inner_products,
)
from tvr.kernels.backends.protocol import InputGradients, SavedTensors, VideoTensors
from tvr.kernels.backends.tile_compiler import tile_function
from tvr.kernels.backends.torch_tiles import VIDEOS_PER_TEXT, split_saved, text_tiles
from tvr.kernels.text_lengths import TextLengths
from tvr.kernels.token_sets import NEIGHBOUR_FACTOR, TokenSet

# 4 MiB of float32 scores: a few tensors of this size fit the caches of a CPU.
CPU_SCORES_PER_TILE = 2**20
# Each kernel of a tile must take longer than its launch: 2**20 scores do on small GPUs.
MIN_SCORES_PER_TILE = 2**20
# The backward holds, per score: the score and the coefficient (4 bytes each), the coefficient's two
# bfloat16 parts (4), and temporaries of the maxima.
BYTES_PER_SCORE = 24
# torch and cuBLAS take longer, 64-bit, ways from this many elements on.
MAX_ELEMENTS = 2**31 - 1


def scores_per_tile(l2_bytes: int, free_bytes: int) -> int:
    """Token-frame scores of a tile on a GPU.

    The scores fill the L2 cache, because every operation on a tile reads them again. They may take
    a quarter of the free memory at most. The number is a power of two, so that small differences of
    free memory do not change the order of sums from run to run.
    """
    largest = min(max(l2_bytes // 4, MIN_SCORES_PER_TILE), free_bytes // 4 // BYTES_PER_SCORE)
    return min(2 ** (max(1, largest).bit_length() - 1), 2**30)


def device_scores_per_tile(device: torch.device) -> int:
    """Token-frame scores of a tile on this device."""
    return _cuda_scores_per_tile(device) if device.type == "cuda" else CPU_SCORES_PER_TILE


@cache
def _cuda_scores_per_tile(device: torch.device) -> int:
    """Measured once a process: tiles of another size would add in another order."""
    # Memory that torch's allocator holds but does not use is free, too.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free_bytes = torch.cuda.mem_get_info(device)[0] + unused
    return scores_per_tile(torch.cuda.get_device_properties(device).L2_cache_size, free_bytes)


@dataclass(frozen=True)
class DenseTiles:
    """`SimilarityBackend` in tiles of n texts x 4 n videos, with dense products."""

    scores_per_tile: int
    chunk: int | None = None
    """Texts in a tile; None: as many as `scores_per_tile` allows."""
    fast: bool = False
    """Rounds the features of the scores to bfloat16; see `similarity.dmae_similarity`."""
    split: bool | None = None
    """Computes float32 products as three bfloat16 products (`matmul.parts`). None does so on a GPU,
    whose tensor cores compute the three faster than its other units compute the one."""
    compile_tiles: bool = False
    """Compiles the operations on a tile with torch.compile (`tile_compiler`)."""
    reads_boosted: ClassVar[bool] = False

    def forward(
        self, text: TokenSet, videos: VideoTensors, *, save: bool
    ) -> tuple[Tensor, SavedTensors]:
        result = text.weights.new_empty(len(text.weights), len(videos.frames))
        score_tile = tile_function(_score_tile, result.device, compiled=self.compile_tiles)
        size = self.texts_per_tile(*_slots(text, videos))
        rows = _row_tiles(text, size)
        operands = [self._operand(row.text.tokens) for row in rows]
        for columns in _columns(videos, size):
            part = videos.part(columns)
            frames = self._operand(part.frames)
            for row, tokens in zip(rows, operands, strict=True):
                scores = self._scores(tokens, frames, row.text, part)
                result[row.texts, columns] = score_tile(
                    scores, row.text.weights, part.weights, part.strength, part.neighbour
                )
        return result, text.tensors if save else ()

    def backward(
        self,
        gradient: Float[Tensor, "A C"],
        saved: SavedTensors,
        videos: VideoTensors,
        lengths: TextLengths | None,
    ) -> InputGradients:
        text, _ = split_saved(saved, lengths)
        differentiate = tile_function(
            _differentiate, text.weights.device, compiled=self.compile_tiles
        )
        size = self.texts_per_tile(*_slots(text, videos))
        rows = _row_tiles(text, size)
        operands = [self._operand(row.text.tokens) for row in rows]
        d_rows = [tuple(map(torch.zeros_like, (x.text.tokens, x.text.weights))) for x in rows]
        d_frames, d_weights, d_strength = (
            None if x is None else torch.zeros_like(x)
            for x in (videos.frames, videos.weights, videos.strength)
        )
        assert d_frames is not None
        for columns in _columns(videos, size):
            part = videos.part(columns)
            frames = self._operand(part.frames)
            for row, operand, (d_tokens, d_token_weights) in zip(
                rows, operands, d_rows, strict=True
            ):
                scores = self._scores(operand, frames, row.text, part)
                # Rounded scores select the maxima, but the gradients are in full precision.
                exact = self._exact_scores(operand, frames, row.text, part) if self.fast else scores
                found = differentiate(
                    scores,
                    exact,
                    gradient[row.texts, columns] / 2,
                    row.text.weights,
                    part.weights,
                    part.strength,
                    part.neighbour,
                )
                del scores, exact
                coefficients = parts(found.coefficients, split=len(frames) > 1)
                transposed = tuple(x.T for x in coefficients)
                d_tokens += product_of_parts(coefficients, frames).view_as(d_tokens)
                d_frames[columns] += product_of_parts(transposed, operand).view_as(part.frames)
                d_token_weights += found.weights
                for total, addend in (
                    (d_weights, found.frame_weights),
                    (d_strength, found.strength),
                ):
                    if total is not None and addend is not None:
                        total[columns] += addend
                del found, coefficients, transposed  # else they live beside the next tile's tables
        all_tokens, all_weights = (torch.zeros_like(x) for x in text.tensors[:2])
        for row, (d_tokens, d_token_weights) in zip(rows, d_rows, strict=True):
            # A padded slot can win a maximum, but is a constant.
            all_tokens[row.texts, : row.slots] = d_tokens.masked_fill_(
                ~row.text.valid[..., None], 0
            )
            all_weights[row.texts, : row.slots] = d_token_weights
        return InputGradients(all_tokens, all_weights, d_frames, d_weights, None, d_strength)

    def texts_per_tile(self, slots: int, frames: int) -> int:
        """Number of texts in a tile, of `slots` tokens each, with videos of `frames` frames."""
        scores_per_pair = slots * frames
        largest = math.isqrt(MAX_ELEMENTS // (VIDEOS_PER_TEXT * scores_per_pair))
        chosen = math.isqrt(self.scores_per_tile // (VIDEOS_PER_TEXT * scores_per_pair))
        return max(1, min(self.chunk or chosen, largest))

    def _operand(self, features: Float[Tensor, "n S D"]) -> Parts:
        rows = features.flatten(0, 1)
        split = rows.device.type == "cuda" if self.split is None else self.split
        return parts(rows, split=split and rows.dtype == torch.float32)

    def _scores(
        self, tokens: Parts, frames: Parts, text: TokenSet, videos: VideoTensors
    ) -> Float[Tensor, "n L m F"]:
        if not self.fast:
            return self._exact_scores(tokens, frames, text, videos)
        rows = text.tokens.flatten(0, 1), videos.frames.flatten(0, 1)
        scores = inner_products(*rows, fast=True)
        return scores.view(*text.weights.shape, *videos.frames.shape[:2])

    def _exact_scores(
        self, tokens: Parts, frames: Parts, text: TokenSet, videos: VideoTensors
    ) -> Float[Tensor, "n L m F"]:
        if len(tokens) > 1:
            scores = split_inner_products(tokens, frames)
        else:
            scores = inner_products(*tokens, *frames)
        return scores.view(*text.weights.shape, *videos.frames.shape[:2])


class _TileGradients(NamedTuple):
    """What the backward of a tile needs beside matrix products."""

    coefficients: Float[Tensor, "nL mF"]
    """Gradient of every token-frame score of the tile: S."""
    weights: Float[Tensor, "n L"]
    frame_weights: Float[Tensor, "m F"] | None
    strength: Float[Tensor, "m F"] | None


def _score_tile(
    scores: Float[Tensor, "n L m F"],
    weights: Float[Tensor, "n L"],
    frame_weights: Float[Tensor, "m F"] | None,
    strength: Float[Tensor, "m F"] | None,
    neighbour: Int[Tensor, "m F"] | None,
) -> Float[Tensor, "n m"]:
    """SIM of a tile."""
    if strength is None or neighbour is None:
        best = scores.amax(3)
    else:
        best, best_frame = scores.max(3, keepdim=True)
        related = strength.expand_as(scores).gather(3, best_frame)
        related = related * scores.gather(3, neighbour.expand_as(scores).gather(3, best_frame))
        best = torch.add(best, related, alpha=NEIGHBOUR_FACTOR).squeeze(3)
    total = torch.einsum("al,alm->am", weights, best)
    if frame_weights is not None:
        total = total + torch.einsum("mf,amf->am", frame_weights, scores.amax(1))
    return total / 2


def _differentiate(
    selecting: Float[Tensor, "n L m F"],
    scores: Float[Tensor, "n L m F"],
    half: Float[Tensor, "n m"],
    weights: Float[Tensor, "n L"],
    frame_weights: Float[Tensor, "m F"] | None,
    strength: Float[Tensor, "m F"] | None,
    neighbour: Int[Tensor, "m F"] | None,
) -> _TileGradients:
    """Backward of `_score_tile` for the gradient 2 x `half`, at the maxima of `selecting`."""
    best_frame = selecting.max(3, keepdim=True).indices
    best = scores.gather(3, best_frame)
    of_best = half[:, None, :, None] * weights[:, :, None, None]
    coefficients = torch.zeros_like(scores)
    d_frame_weights = d_strength = None
    if strength is None or neighbour is None:
        coefficients = coefficients.scatter_(3, best_frame, of_best)
    else:
        factor = NEIGHBOUR_FACTOR * strength.expand_as(scores).gather(3, best_frame)
        other_frame = neighbour.expand_as(scores).gather(3, best_frame)
        related = scores.gather(3, other_frame)
        best = best + factor * related
        # The table holds the gradients of r at first; the next scatter replaces all of them.
        coefficients = coefficients.scatter_(3, best_frame, NEIGHBOUR_FACTOR * of_best * related)
        d_strength = coefficients.sum((0, 1))
        coefficients = coefficients.scatter_(3, best_frame, of_best)
        coefficients = _add_at(coefficients, 3, other_frame, of_best * factor)
    d_weights = torch.einsum("am,alm->al", half, best.squeeze(3))
    if frame_weights is not None:
        best_token = selecting.max(1, keepdim=True).indices
        best = scores.gather(1, best_token)
        d_frame_weights = torch.einsum("am,amf->mf", half, best.squeeze(1))
        of_frames = (half[..., None] * frame_weights)[:, None]
        coefficients = _add_at(coefficients, 1, best_token, of_frames)
    coefficients = coefficients.flatten(2).flatten(0, 1)
    return _TileGradients(coefficients, d_weights, d_frame_weights, d_strength)


def _add_at(table: Tensor, dim: int, index: Tensor, values: Tensor) -> Tensor:
    """Adds values in place at one index of each line along `dim`; no two meet, so no atomics."""
    return table.scatter_(dim, index, table.gather(dim, index) + values)


class _RowTile(NamedTuple):
    """Texts of a tile: their rows, and their token set cut to `slots`, without padding's values."""

    texts: slice | Tensor
    slots: int
    text: TokenSet


def _row_tiles(text: TokenSet, size: int) -> list[_RowTile]:
    """Tiles of `size` texts, sorted by length and cut to the longest of their tile."""
    return [_RowTile(tile.texts, tile.slots, tile.select(text)) for tile in text_tiles(text, size)]


def _slots(text: TokenSet, videos: VideoTensors) -> tuple[int, int]:
    return text.weights.shape[1], videos.frames.shape[1]


def _columns(videos: VideoTensors, size: int) -> Iterator[slice]:
    for first in range(0, len(videos.frames), VIDEOS_PER_TEXT * size):
        yield slice(first, first + VIDEOS_PER_TEXT * size)
