"""The compiled CPU kernels as one differentiable operation on packed texts.

It keeps per pair the score and one byte for each of its L + F maxima, so memory grows as A x C and
never as A x L x C x F; padded words are packed away and cost nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tvr.kernels import compiled
from tvr.kernels.reference import NEIGHBOUR_FACTOR, FrameSet, TokenSet

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


def packed_similarity(texts: tuple[TokenSet, ...], videos: FrameSet) -> Float[Tensor, "A C"]:
    """`reference.block_similarity`, compiled; not differentiable twice."""
    boosted = strength = None
    if videos.strength is not None and videos.neighbour is not None:
        strength = videos.strength.detach()
        if torch.is_grad_enabled():
            # p = <x, v + 0.5 r v[n]> at the best frame: these rows carry the gradients of r.
            places = videos.neighbour[..., None].expand_as(videos.frames)
            related = videos.strength[..., None] * videos.frames.gather(1, places)
            boosted = videos.frames + NEIGHBOUR_FACTOR * related
    result: Tensor | None = None
    for text in texts:
        # Every frame's best token is the only one there is: one plain matrix product.
        alone = text.tokens.shape[1] == 1
        frame_weights = None if alone else videos.weights
        part = _SetSimilarity.apply(
            *text, videos.frames, frame_weights, boosted, strength, videos.neighbour
        )
        if alone:
            mean_frame = torch.einsum("cf,cfd->cd", videos.weights, videos.frames)
            part = torch.addmm(part, text.tokens.squeeze(1), mean_frame.T, alpha=0.5)
        result = part if result is None else result + part
    assert result is not None
    return result / len(texts) if len(texts) > 1 else result


class _Packed(NamedTuple):
    """Valid tokens of A texts, one after another."""

    tokens: Float[Tensor, "R D"]
    weights: Float[Tensor, " R"]
    offsets: Int[Tensor, " A+1"]
    places: Int[Tensor, " R"] | None
    """Where they stood among A x L; None: all were valid."""


def _pack(tokens: Tensor, weights: Tensor, valid: Tensor) -> _Packed:
    num_texts, slots = valid.shape
    counts = valid.sum(dim=1)
    offsets = torch.zeros(num_texts + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    flat, flat_weights = tokens.flatten(0, 1), weights.flatten()
    if int(offsets[-1]) == num_texts * slots:
        return _Packed(flat, flat_weights, offsets, None)
    places = valid.flatten().nonzero().squeeze(1)
    return _Packed(flat[places], flat_weights[places], offsets, places)


class _SetSimilarity(torch.autograd.Function):
    """SIM of one token set; `strength` and `neighbour` are values, `boosted` has their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weights: Tensor,
        valid: Tensor,
        frames: Tensor,
        frame_weights: Tensor | None,
        boosted: Tensor | None,
        strength: Tensor | None,
        neighbour: Tensor | None,
    ) -> Tensor:
        keep = any(ctx.needs_input_grad)
        packed = _pack(tokens, weights, valid)
        padded = packed.offsets.diff() < valid.shape[1]
        scores, best_frame, best_token = torch.ops.tvr_kernels.similarity_forward(
            *packed[:3], padded, frames, frame_weights, strength, neighbour, keep
        )
        ctx.slots = valid.shape
        ctx.save_for_backward(*packed, frames, frame_weights, boosted, best_frame, best_token)
        return scores

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's "ctx, /")
        ctx: Any, *gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        tokens, weights, offsets, places, frames, frame_weights, *rest = ctx.saved_tensors
        of_tokens, of_weights, of_frames, of_frame_weights, of_boosted = (
            torch.ops.tvr_kernels.similarity_backward(
                *gradient, tokens, weights, offsets, frames, frame_weights, *rest
            )
        )
        return (
            _unpack(of_tokens, places, ctx.slots),
            _unpack(of_weights, places, ctx.slots),
            None,
            of_frames,
            None if frame_weights is None else of_frame_weights,
            # Without boosted frames one buffer served both sorts of maxima.
            None if rest[0] is None else of_boosted,
            None,
            None,
        )


def _unpack(rows: Tensor, places: Tensor | None, slots: torch.Size) -> Tensor:
    if places is None:
        return rows.unflatten(0, slots)
    whole = rows.new_zeros(slots.numel(), *rows.shape[1:])
    return whole.index_copy_(0, places, rows).unflatten(0, slots)
