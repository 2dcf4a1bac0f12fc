"""The similarity that the rest of the project calls: the reference, in tiles of bounded memory.

Two backends, equal to rounding. `compiled` (float32 and float64 on a CPU): one operator with a
hand-written backward, which keeps per pair the score and one byte for each of its L + F maxima.
`torch`: checkpointed tiles of the reference, on every device.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tvr.kernels import compiled
from tvr.kernels.reference import (
    NEIGHBOUR_FACTOR,
    FrameSet,
    TokenSet,
    block_similarity,
    full_precision,
    prepare,
)

# A tile of this many token-frame scores (32 MiB in float32) keeps matrix products large enough to
# run at full speed, and a few copies of it (scores, indices, gradients) are all that is ever alive.
SCORES_PER_TILE = 2**23
VIDEOS_PER_TEXT = 4
# The compiled kernels keep the place of a maximum in one byte.
MOST_SLOTS = 255

BACKENDS = ("compiled", "torch")


def dmae_similarity(
    sentence: Float[Tensor, "A D"] | None,
    words: Float[Tensor, "A T D"] | None,
    frames: Float[Tensor, "C F D"],
    word_mask: Int[Tensor, "A T"],
    frame_mask: Int[Tensor, "C F"],
    *,
    interaction: str = "att_wti",
    neighbour_frames: bool = True,
    word_logits: Float[Tensor, "A T"] | None = None,
    frame_logits: Float[Tensor, "C F"] | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> Float[Tensor, "A C"]:
    """Unscaled similarity of every text with every video; `reference.dmae_similarity` defines it.

    `backend` None takes "compiled" for features on a CPU with at most 255 words and frames where
    the kernels can be compiled (`compiled.backend` says why not), else "torch". "compiled" keeps
    L + F bytes for each pair and token set for its backward, which is not differentiable again.

    "torch" computes tiles of `chunk` texts x 4 `chunk` videos, whose insides are computed anew in
    the backward: memory grows as A x C and never as A x T x C x F, and the result is the same for
    every `chunk`. None takes the largest chunk whose tiles hold at most 2**23 token-frame scores.
    A `chunk` is a wish about these tiles: with it, `backend` None is "torch".

    Raises:
        ValueError: as the reference; for a chunk below 1; for an unknown backend, or "compiled"
            where it cannot be had.
    """
    _check_options(chunk, backend)
    with full_precision(frames.device):
        texts, videos = prepare(
            sentence,
            words,
            frames,
            word_mask,
            frame_mask,
            interaction=interaction,
            neighbour_frames=neighbour_frames,
            word_logits=word_logits,
            frame_logits=frame_logits,
        )
        if backend is None:
            backend = "torch" if chunk or _hindrance(texts, videos) else "compiled"
        elif backend == "compiled" and (hindrance := _hindrance(texts, videos)):
            raise ValueError(f"backend='compiled' cannot serve here: {hindrance}")
        if backend == "compiled":
            return _compiled(texts, videos)
        return _tiled(texts, videos, chunk or chunk_size(texts, videos))


def chunk_size(texts: tuple[TokenSet, ...], videos: FrameSet) -> int:
    """Texts per tile such that chunk x 4 chunk pairs hold at most `SCORES_PER_TILE` scores."""
    scores_per_pair = max(tokens.weights.shape[1] for tokens in texts) * videos.weights.shape[1]
    return max(1, math.isqrt(SCORES_PER_TILE // (VIDEOS_PER_TEXT * scores_per_pair)))


def _check_options(chunk: int | None, backend: str | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 text per tile, or None to choose one")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}, or None")
    if backend == "compiled" and chunk is not None:
        raise ValueError(f"chunk={chunk} is for backend='torch': the compiled tiles fit the cache")


def _hindrance(texts: tuple[TokenSet, ...], videos: FrameSet) -> str | None:
    """Why the compiled kernels cannot score these, or None; the first call may compile them."""
    device, dtype = videos.frames.device, videos.frames.dtype
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return f"it scores float32 and float64 on a CPU, not {dtype} on {device}"
    slots = max(x.weights.shape[1] for x in (*texts, videos))
    if slots > MOST_SLOTS:
        return f"{slots} words or frames are more than {MOST_SLOTS}"
    name, reason = compiled.backend()
    return None if name == "compiled" else reason


def _compiled(texts: tuple[TokenSet, ...], videos: FrameSet) -> Float[Tensor, "A C"]:
    boosted = None
    if videos.strength is not None and videos.neighbour is not None and torch.is_grad_enabled():
        # p = <x, v + 0.5 r v[n]> at the best frame: the boosted frames carry the gradients of r.
        places = videos.neighbour[..., None].expand_as(videos.frames)
        related = videos.strength[..., None] * videos.frames.gather(1, places)
        boosted = videos.frames + NEIGHBOUR_FACTOR * related
    strength = None if videos.strength is None else videos.strength.detach()
    tables = (boosted, strength, videos.neighbour, torch.is_grad_enabled())
    scores = []
    for tokens, weights in ((x.tokens, x.weights) for x in texts):
        if tokens.shape[1] > 1:
            part = _SetSimilarity.apply(tokens, weights, videos.frames, videos.weights, *tables)
        else:
            # Every frame's best token is the only one: that part is one plain matrix product, and
            # weights of 0 leave it out of the other.
            nothing = torch.zeros_like(videos.weights)
            part = _SetSimilarity.apply(tokens, weights, videos.frames, nothing, *tables)
            mean_frame = torch.einsum("cf,cfd->cd", videos.weights, videos.frames)
            part = part + tokens.squeeze(1) @ mean_frame.T / 2
        scores.append(part)
    return torch.stack(scores).mean(dim=0)


class _SetSimilarity(torch.autograd.Function):
    """SIM of one token set; `strength` and `neighbour` are values, `boosted` has their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weights: Tensor,
        frames: Tensor,
        frame_weights: Tensor,
        boosted: Tensor | None,
        strength: Tensor | None,
        neighbour: Tensor | None,
        keep: bool,
    ) -> Tensor:
        keep = keep and any(ctx.needs_input_grad)
        scores, best_frame, best_token = torch.ops.tvr_kernels.similarity_forward(
            tokens, weights, frames, frame_weights, strength, neighbour, keep
        )
        ctx.save_for_backward(
            tokens, weights, frames, frame_weights, boosted, best_frame, best_token
        )
        return scores

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's "ctx, /")
        ctx: Any, *gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        tokens, weights, frames, frame_weights, boosted, *best = ctx.saved_tensors
        of_tokens, of_weights, of_frames, of_frame_weights, of_boosted = (
            torch.ops.tvr_kernels.similarity_backward(
                *gradient, tokens, weights, frames, frame_weights, boosted, *best
            )
        )
        if boosted is None:
            # One buffer then serves both sorts of maxima.
            of_boosted = None
        return of_tokens, of_weights, of_frames, of_frame_weights, of_boosted, None, None, None


def _tiled(texts: tuple[TokenSet, ...], videos: FrameSet, chunk: int) -> Float[Tensor, "A C"]:
    num_texts, num_videos = texts[0].weights.shape[0], videos.weights.shape[0]
    if num_texts <= chunk and num_videos <= VIDEOS_PER_TEXT * chunk:
        # One tile must be alive in the backward anyway: computing it twice would save nothing.
        return block_similarity(texts, videos)
    video_tiles = _split_videos(videos, VIDEOS_PER_TEXT * chunk)
    rows = []
    for text_tile in zip(*(_split_texts(tokens, chunk) for tokens in texts), strict=True):
        tiles = [
            checkpoint(
                block_similarity,
                text_tile,
                video_tile,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for video_tile in video_tiles
        ]
        rows.append(torch.cat(tiles, dim=1))
    return torch.cat(rows)


# split, not slices: the backward of a slice fills a zero tensor of the whole size for every tile,
# that of a split joins the parts once.
def _split_texts(texts: TokenSet, size: int) -> list[TokenSet]:
    parts = zip(texts.tokens.split(size), texts.weights.split(size), strict=True)
    return [TokenSet(*part) for part in parts]


def _split_videos(videos: FrameSet, size: int) -> list[FrameSet]:
    frames, weights = videos.frames.split(size), videos.weights.split(size)
    tables = [
        [None] * len(frames) if table is None else table.split(size)
        for table in (videos.strength, videos.neighbour)
    ]
    return [FrameSet(*part) for part in zip(frames, weights, *tables, strict=True)]
