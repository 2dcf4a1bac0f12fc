"""The engine of the compiled CPU kernels: padded words are packed away and cost nothing.

It keeps one byte for each of the L + F maxima of a pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvr.kernels.backends import cpu_build as compiled
from tvr.kernels.backends.matmul import by_onednn
from tvr.kernels.backends.protocol import Gradients, Kept, Videos
from tvr.kernels.reference import FrameSet, TokenSet

# The kernels keep the place of a maximum in one byte, and 255 stands for padding.
MOST_SLOTS = 255


def hindrance(texts: tuple[TokenSet, ...], videos: FrameSet) -> str | None:
    """Why the compiled kernels cannot score these, or None; the first call may compile them."""
    device, dtype = videos.frames.device, videos.frames.dtype
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return f"they score float32 and float64 on a CPU, not {dtype} on {device}"
    slots = max(x.weights.shape[1] for x in (*texts, videos))
    if slots > MOST_SLOTS:
        return f"{slots} words or frames are more than {MOST_SLOTS}"
    name, reason = compiled.backend()
    return None if name == "compiled" else reason


@dataclass(frozen=True)
class Kernels:
    """`set_similarity.Engine` by `similarity_forward.cpp` and `similarity_backward.cpp`.

    `fast`: the products are of features rounded to bfloat16 (see `similarity.dmae_similarity`).
    """

    fast: bool = False

    def scores(self, text: TokenSet, videos: Videos, *, keep: bool) -> tuple[Tensor, Kept]:
        packed = _pack(text)
        padded = packed.offsets.diff() < text.valid.shape[1]
        scores, best_frame, best_token = torch.ops.tvr_kernels.similarity_forward(
            *packed[:3],
            padded,
            videos.frames,
            videos.weights,
            videos.strength,
            videos.neighbour,
            keep,
            self.fast,
            by_onednn(videos.frames),
        )
        return scores, (text.valid, *packed, best_frame, best_token)

    def gradients(self, gradient: Float[Tensor, "A C"], kept: Kept, videos: Videos) -> Gradients:
        valid, tokens, weights, offsets, places, best_frame, best_token = kept
        assert valid is not None
        of_tokens, of_weights, of_frames, of_frame_weights, of_boosted = (
            torch.ops.tvr_kernels.similarity_backward(
                gradient,
                tokens,
                weights,
                offsets,
                videos.frames,
                videos.weights,
                videos.boosted,
                best_frame,
                best_token,
            )
        )
        return Gradients(
            _unpack(of_tokens, places, valid.shape),
            _unpack(of_weights, places, valid.shape),
            of_frames,
            None if videos.weights is None else of_frame_weights,
            # Without boosted frames one buffer served both sorts of maxima.
            None if videos.boosted is None else of_boosted,
        )


class _Packed(NamedTuple):
    """Valid tokens of A texts, one after another."""

    tokens: Float[Tensor, "R D"]
    weights: Float[Tensor, " R"]
    offsets: Int[Tensor, " A+1"]
    places: Int[Tensor, " R"] | None
    """Where they stood among A x L; None: all were valid."""


def _pack(text: TokenSet) -> _Packed:
    num_texts, slots = text.valid.shape
    counts = text.valid.sum(dim=1)
    offsets = torch.zeros(num_texts + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    flat, flat_weights = text.tokens.flatten(0, 1), text.weights.flatten()
    if int(offsets[-1]) == num_texts * slots:
        return _Packed(flat, flat_weights, offsets, None)
    places = text.valid.flatten().nonzero().squeeze(1)
    return _Packed(flat[places], flat_weights[places], offsets, places)


def _unpack(rows: Tensor, places: Tensor | None, slots: torch.Size) -> Tensor:
    if places is None:
        return rows.unflatten(0, slots)
    whole = rows.new_zeros(slots.numel(), *rows.shape[1:])
    return whole.index_copy_(0, places, rows).unflatten(0, slots)
