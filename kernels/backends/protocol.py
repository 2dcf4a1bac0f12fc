"""The similarity of token sets with videos as one differentiable operation, whoever computes it.

A pair of token set and video has only L + F scores that the result depends on: the maxima. An
engine keeps their places, small whole numbers, and the backward is a sum of few rows. Memory grows
as A x C and never as A x L x C x F. Engines: `packed.Kernels` (compiled), `tiles.Tiles` (torch).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tvr.kernels.reference import NEIGHBOUR_FACTOR, FrameSet, TokenSet

Kept = tuple[Tensor | None, ...]


class Videos(NamedTuple):
    """What an engine needs of C videos; values, no graph."""

    frames: Float[Tensor, "C F D"]
    weights: Float[Tensor, "C F"] | None
    """None: the video part, sum_f weight x max_t S, is left out."""
    boosted: Float[Tensor, "C F D"] | None
    """v + 0.5 r v[n], so that p = <x, boosted[best frame]>; None without neighbour frames."""
    strength: Float[Tensor, "C F"] | None
    neighbour: Int[Tensor, "C F"] | None

    def part(self, columns: slice) -> Videos:
        """Some of the videos, as views."""
        first, *rest = self
        return Videos(first[columns], *(None if x is None else x[columns] for x in rest))


class Gradients(NamedTuple):
    """Of the sum of `gradient` x scores, with respect to what the scores were computed from."""

    tokens: Float[Tensor, "A L D"]
    weights: Float[Tensor, "A L"]
    frames: Float[Tensor, "C F D"]
    """Without boosted frames those of all maxima; with them only those of max_t."""
    frame_weights: Float[Tensor, "C F"] | None
    boosted: Float[Tensor, "C F D"] | None


@runtime_checkable
class Engine(Protocol):
    """Scores a token set with videos, and goes back from the scores' gradient."""

    def scores(self, text: TokenSet, videos: Videos, *, keep: bool) -> tuple[Tensor, Kept]:
        """SIM (A, C) of a token set and, if `keep`, what `gradients` needs of it."""
        ...

    def gradients(self, gradient: Float[Tensor, "A C"], kept: Kept, videos: Videos) -> Gradients:
        """By hand: sums of the rows that the maxima met."""
        ...


def mean_similarity(
    texts: tuple[TokenSet, ...], videos: FrameSet, engine: Engine
) -> Float[Tensor, "A C"]:
    """`reference.block_similarity` by an engine; not differentiable twice."""
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
            engine, *text, videos.frames, frame_weights, boosted, strength, videos.neighbour
        )
        if alone:
            mean_frame = torch.einsum("cf,cfd->cd", videos.weights, videos.frames)
            part = torch.addmm(part, text.tokens.squeeze(1), mean_frame.T, alpha=0.5)
        result = part if result is None else result + part
    assert result is not None
    return result / len(texts) if len(texts) > 1 else result


class _SetSimilarity(torch.autograd.Function):
    """SIM of one token set; `strength` and `neighbour` are values, `boosted` has their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        tokens: Tensor,
        weights: Tensor,
        valid: Tensor,
        frames: Tensor,
        frame_weights: Tensor | None,
        boosted: Tensor | None,
        strength: Tensor | None,
        neighbour: Tensor | None,
    ) -> Tensor:
        text = TokenSet(tokens, weights, valid)
        videos = Videos(frames, frame_weights, boosted, strength, neighbour)
        scores, kept = engine.scores(text, videos, keep=any(ctx.needs_input_grad))
        ctx.engine = engine
        ctx.save_for_backward(*videos, *kept)
        return scores

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's "ctx, /")
        ctx: Any, *gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        size = len(Videos._fields)
        videos, kept = Videos(*ctx.saved_tensors[:size]), ctx.saved_tensors[size:]
        found: Gradients = ctx.engine.gradients(*gradient, kept, videos)
        of_text = (found.tokens, found.weights, None)
        of_videos = (found.frames, found.frame_weights, found.boosted, None, None)
        return None, *of_text, *of_videos
