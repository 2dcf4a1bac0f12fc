"""Similarity backend of the compiled CPU kernels.

Valid tokens are packed, so that padding costs nothing. The kernels save one byte for each of the
L + F maxima of a pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvr.kernels.backends import cpu_build
from tvr.kernels.backends.matmul import uses_onednn
from tvr.kernels.backends.protocol import InputGradients, SavedTensors, VideoTensors
from tvr.kernels.text_lengths import TextLengths
from tvr.kernels.token_sets import FrameSet, TokenSet

# The kernels save the index of a maximum in one byte, and 255 marks padding.
MAX_SLOTS = 255


def unsupported_reason(texts: tuple[TokenSet, ...], videos: FrameSet) -> str | None:
    """Returns why the compiled kernels cannot score these inputs, or None if they can.

    The first call in a process may compile the kernels.
    """
    device, dtype = videos.frames.device, videos.frames.dtype
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return f"the compiled kernels need float32 or float64 on a CPU, not {dtype} on {device}"
    slots = max(videos.frames.shape[1], *(x.weights.shape[1] for x in texts))
    if slots > MAX_SLOTS:
        return f"{slots} words or frames are more than {MAX_SLOTS}"
    name, reason = cpu_build.available_backend()
    return None if name == "compiled" else reason


@dataclass(frozen=True)
class CpuBackend:
    """`SimilarityBackend` in C++: `similarity_forward.cpp` and `similarity_backward.cpp`."""

    fast: bool = False
    """Rounds the features of the products to bfloat16; see `similarity.dmae_similarity`."""
    reads_boosted: ClassVar[bool] = True

    def forward(
        self, text: TokenSet, videos: VideoTensors, *, save: bool
    ) -> tuple[Tensor, SavedTensors]:
        packed = _pack(text)
        padded = packed.offsets.diff() < text.valid.shape[1]
        scores, best_frame, best_token = torch.ops.tvr_kernels.similarity_forward(
            packed.tokens,
            packed.weights,
            packed.offsets,
            padded,
            videos.frames,
            videos.weights,
            videos.strength,
            videos.neighbour,
            save,
            self.fast,
            uses_onednn(videos.frames),
        )
        return scores, (text.valid, *packed, best_frame, best_token)

    def backward(
        self,
        gradient: Float[Tensor, "A C"],
        saved: SavedTensors,
        videos: VideoTensors,
        lengths: TextLengths | None,
    ) -> InputGradients:
        valid, tokens, weights, offsets, slots, best_frame, best_token = saved
        assert valid is not None
        d_tokens, d_weights, d_frames, d_frame_weights, d_boosted = (
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
        return InputGradients(
            _unpack(d_tokens, slots, valid.shape),
            _unpack(d_weights, slots, valid.shape),
            d_frames,
            None if videos.weights is None else d_frame_weights,
            # Without boosted frames the kernel adds both kinds of maxima to `d_frames`.
            None if videos.boosted is None else d_boosted,
        )


class _PackedTokens(NamedTuple):
    """Valid tokens of A texts, concatenated."""

    tokens: Float[Tensor, "R D"]
    weights: Float[Tensor, " R"]
    offsets: Int[Tensor, " A+1"]
    slots: Int[Tensor, " R"] | None
    """Index of each token among the A x L slots; None if all slots are valid."""


def _pack(text: TokenSet) -> _PackedTokens:
    num_texts, num_slots = text.valid.shape
    counts = text.valid.sum(dim=1)
    offsets = torch.zeros(num_texts + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    tokens, weights = text.tokens.flatten(0, 1), text.weights.flatten()
    if int(offsets[-1]) == num_texts * num_slots:
        return _PackedTokens(tokens, weights, offsets, None)
    slots = text.valid.flatten().nonzero().squeeze(1)
    return _PackedTokens(tokens[slots], weights[slots], offsets, slots)


def _unpack(rows: Tensor, slots: Tensor | None, shape: torch.Size) -> Tensor:
    if slots is None:
        return rows.unflatten(0, shape)
    result = rows.new_zeros(shape.numel(), *rows.shape[1:])
    return result.index_copy_(0, slots, rows).unflatten(0, shape)
