"""The similarity of token sets with videos as one differentiable operation, for any backend.

The score of a text and a video depends on L + F of their token-frame scores only: the maxima. A
backend saves the indices of the maxima, one small integer each, or finds them again; the backward
is a weighted gather and its transpose (scatter-add). Memory grows as A x C, never as A x L x C x F.
Backends: `cpu.CpuBackend` (compiled), `torch_tiles.TorchTiles` (every device) and
`torch_dense.DenseTiles` (every device, made for tensor cores).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tvr.kernels.backends.matmul import inner_products, product_of_parts
from tvr.kernels.text_lengths import TextLengths
from tvr.kernels.token_sets import NEIGHBOUR_FACTOR, FrameSet, TokenSet

SavedTensors = tuple[Tensor | None, ...]


class VideoTensors(NamedTuple):
    """Inputs of a backend for C videos: plain values, without autograd history."""

    frames: Float[Tensor, "C F D"]
    weights: Float[Tensor, "C F"] | None
    """None skips the video part, sum_f weight x max_t S."""
    boosted: Float[Tensor, "C F D"] | None
    """v + 0.5 r v[n], so that p = <x, boosted[best frame]>; None without neighbour frames, or for a
    backend that does not read it."""
    strength: Float[Tensor, "C F"] | None
    neighbour: Int[Tensor, "C F"] | None

    def part(self, columns: slice) -> VideoTensors:
        """Views of some of the videos."""
        first, *rest = self
        return VideoTensors(first[columns], *(None if x is None else x[columns] for x in rest))


class InputGradients(NamedTuple):
    """Gradients of a backend's inputs."""

    tokens: Float[Tensor, "A L D"]
    weights: Float[Tensor, "A L"]
    frames: Float[Tensor, "C F D"]
    """Gradient from all maxima; with boosted frames, from the maxima over tokens only."""
    frame_weights: Float[Tensor, "C F"] | None
    boosted: Float[Tensor, "C F D"] | None
    """Gradient from the maxima over frames; None without boosted frames."""
    strength: Float[Tensor, "C F"] | None = None
    """None if it passes through the boosted frames."""


@runtime_checkable
class SimilarityBackend(Protocol):
    """Computes SIM of one token set with C videos, and its gradients."""

    reads_boosted: ClassVar[bool]
    """True if the backward reads boosted frames, False if it returns a gradient of strength."""

    def forward(
        self, text: TokenSet, videos: VideoTensors, *, save: bool
    ) -> tuple[Tensor, SavedTensors]:
        """Returns SIM (A, C) and, with `save`, the tensors that `backward` needs."""
        ...

    def backward(
        self,
        gradient: Float[Tensor, "A C"],
        saved: SavedTensors,
        videos: VideoTensors,
        lengths: TextLengths | None,
    ) -> InputGradients:
        """Analytic backward from what `forward` saved; `lengths` are those of the texts."""
        ...


def mean_similarity(
    texts: tuple[TokenSet, ...], videos: FrameSet, backend: SimilarityBackend
) -> Float[Tensor, "A C"]:
    """Mean over the token sets of SIM(token set). It is differentiable once.

    A video set without weights (`words_to_frames`) has no video part and no factor 1/2. A backend
    halves the sum of both parts; here it gets doubled weights of the tokens, which is exact.
    """
    boosted = strength = None
    both_ways = videos.weights is not None
    if videos.strength is not None and videos.neighbour is not None:
        strength = videos.strength
        if backend.reads_boosted:
            strength = strength.detach()
            if torch.is_grad_enabled():
                # p = <x, v + 0.5 r v[n]> at the best frame. Autograd differentiates r through it.
                index = videos.neighbour[..., None].expand_as(videos.frames)
                related = videos.strength[..., None] * videos.frames.gather(1, index)
                boosted = videos.frames + NEIGHBOUR_FACTOR * related
    result: Tensor | None = None
    for text in texts:
        # With a single token, max_t is the token itself: the video part is a matrix product.
        single_token = text.tokens.shape[1] == 1
        if single_token and videos.frames.shape[1] == 1:
            part = _SingleSlots.apply(text.tokens, text.weights, videos.frames, videos.weights)
            result = part if result is None else result + part
            continue
        frame_weights = None if single_token else videos.weights
        part = _SetSimilarity.apply(
            backend,
            text.lengths,
            text.tokens,
            text.weights if both_ways else 2 * text.weights,
            text.valid,
            videos.frames,
            frame_weights,
            boosted,
            strength,
            videos.neighbour,
        )
        if single_token and both_ways:
            mean_frame = torch.einsum("cf,cfd->cd", videos.weights, videos.frames)
            part = torch.addmm(part, text.tokens.squeeze(1), mean_frame.T, alpha=0.5)
        result = part if result is None else result + part
    assert result is not None
    return result / len(texts) if len(texts) > 1 else result


class _SingleSlots(torch.autograd.Function):
    """SIM of texts of one token with videos of one frame: a matrix product.

    No maximum has a choice, and a single frame has no neighbour: p = q = S. Neither side has
    padding, because a text or video without a valid slot is refused. The frame's weight is 1, and
    the token's is its mask or 1. Both are constants: a softmax over one slot has gradient 0.
    Without the frame's weight SIM is the token's part, weight x S.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weights: Tensor, frames: Tensor, frame_weights: Tensor | None
    ) -> Tensor:
        factor = weights if frame_weights is None else (weights + 1) / 2
        scaled = tokens.squeeze(1) * factor
        ctx.save_for_backward(scaled, weights, factor, frames)
        ctx.frame_weights_shape = None if frame_weights is None else frame_weights.shape
        return inner_products(scaled, frames.squeeze(1))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's "ctx, /")
        ctx: Any, *gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        scaled, weights, factor, frames = ctx.saved_tensors
        d_scores, video = gradient[0], frames.squeeze(1)
        d_tokens = d_frames = None
        if ctx.needs_input_grad[0]:
            d_tokens = product_of_parts((d_scores,), (video,)) * factor
            d_tokens = d_tokens.unsqueeze(1)
        if ctx.needs_input_grad[2]:
            d_frames = product_of_parts((d_scores.T,), (scaled,)).unsqueeze(1)
        shape = ctx.frame_weights_shape
        d_frame_weights = None if shape is None else weights.new_zeros(shape)
        return d_tokens, torch.zeros_like(weights), d_frames, d_frame_weights


class _SetSimilarity(torch.autograd.Function):
    """SIM of one token set. The gradient of `strength` passes through `boosted`."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: SimilarityBackend,
        lengths: TextLengths | None,
        tokens: Tensor,
        weights: Tensor,
        valid: Tensor,
        frames: Tensor,
        frame_weights: Tensor | None,
        boosted: Tensor | None,
        strength: Tensor | None,
        neighbour: Tensor | None,
    ) -> Tensor:
        text = TokenSet(tokens, weights, valid, lengths)
        videos = VideoTensors(frames, frame_weights, boosted, strength, neighbour)
        scores, saved = backend.forward(text, videos, save=any(ctx.needs_input_grad))
        ctx.backend, ctx.lengths = backend, lengths
        ctx.save_for_backward(*videos, *saved)
        return scores

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's "ctx, /")
        ctx: Any, *gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        size = len(VideoTensors._fields)
        videos, saved = VideoTensors(*ctx.saved_tensors[:size]), ctx.saved_tensors[size:]
        result: InputGradients = ctx.backend.backward(*gradient, saved, videos, ctx.lengths)
        text_gradients = (result.tokens, result.weights, None)
        of_frames = (result.frames, result.frame_weights)
        video_gradients = (*of_frames, result.boosted, result.strength, None)
        return None, None, *text_gradients, *video_gradients
