"""TPM-CL: a matched pair must score above its partial versions, which lack the weightiest tokens.

A predictor computes token weights from the other modality. A selector drops the tokens of largest
weight. Triplet margins then compare the whole pair with the partial one. The loss uses matched
pairs only, so only these are computed, in chunks: O(B) work where all pairs would need O(B^2), and
O(1) memory beyond the inputs and their gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvr.kernels.checkpointed_chunks import pairs_per_chunk, run_in_chunks
from tvr.kernels.checks import check_matching
from tvr.kernels.device_transfer import to_host
from tvr.kernels.numerics import at_least_float32, masked_softmax, no_autocast, unit
from tvr.kernels.token_weights import AttentionTokenWeights, LinearTokenWeights

__all__ = ["AttentionTokenWeights", "LinearTokenWeights", "TpmCl", "select_tokens", "tpm_cl"]

# Margins that each kind sums.
MARGINS_OF_KIND = {2: (1, 2), 3: (3,), 4: (1, 2, 3)}


@dataclass(frozen=True)
class TpmCl:
    """Hinge and similarities of each matched pair.

    `whole_words` and `partial_words` are the weighted sums of all words and of the kept words.
    `partial_frames` is the video without its dropped frames.
    """

    hinge: Float[Tensor, " B"]
    """Sum of the margins; the caller averages it over the global batch."""
    sentence_frames: Float[Tensor, " B"]
    sentence_partial_frames: Float[Tensor, " B"]
    whole_words_frames: Float[Tensor, " B"]
    whole_words_partial_frames: Float[Tensor, " B"]
    partial_words_frames: Float[Tensor, " B"]


def tpm_cl(
    sentence: Float[Tensor, "B D"],
    words: Float[Tensor, "B T D"],
    frames: Float[Tensor, "B F D"],
    frame_mask: Int[Tensor, "B F"],
    *,
    word_weights: Float[Tensor, "B T"],
    frame_weights: Float[Tensor, "B F"],
    frame_weight_layer: Callable[[Tensor], Tensor] | None,
    matching: str = "two_way",
    kind: int = 4,
    threshold: float = 0.6,
    margin: float = 0.6,
    straight_through: bool = False,
    normalise_partial: bool = False,
    chunk: int | None = None,
    check_mask: bool = True,
) -> TpmCl:
    """Computes the triplet partial margins of B matched pairs (method section 4).

    With s(x, video) = 1/2 (max_f S + agg_f S), or with `words_to_frames` s = max_f S, the margins
    require
        1: s(sentence, partial frames) + margin <= s(sentence, frames),
        2: s(whole words, partial frames) + margin <= s(whole words, frames),
        3: s(partial words, frames) + margin <= s(whole words, frames).
    Neighbour frames and word masks are not used.

    Args:
        word_weights: Outputs of a predictor with the frames as queries.
        frame_weights: Outputs of a predictor with the sentence as query. As published, they act
            through the hard selection only, and their predictor gets no gradient.
        frame_weight_layer: Logits of the weights in agg, a softmax over valid frames, computed
            again for the partial video (wti family); None takes the mean over valid frames (ti
            family). The layer gets one chunk at a time, and again in the backward: it must treat
            each frame alone and use no random numbers. `words_to_frames` has no agg and no layer.
        matching: As in `similarity.dmae_similarity`, so that a token's similarity is that of a text
            of this one token. The published code has `two_way` only.
        kind: 2 sums margins 1 and 2, 3 takes margin 3, 4 sums all three.
        threshold: Cumulative weight of the tokens that the selector drops; see `select_tokens`.
        straight_through: Gives the selection of words and frames a gradient; see `select_tokens`.
        normalise_partial: Gives the partial words unit length. As published they are shorter, and
            their length alone satisfies a part of margin 3.
        chunk: Pairs per chunk, recomputed in the backward. None takes as many as fit in
            `checkpointed_chunks.ENTRIES_PER_CHUNK`. The result does not depend on it.
        check_mask: False if the caller has checked `frame_mask` on the host
            (`text_lengths.host_lengths`): on a GPU, to read it here waits for its queue.

    Raises:
        ValueError: unknown kind or matching, a chunk below 1, or a video without a valid frame.
    """
    if kind not in MARGINS_OF_KIND:
        raise ValueError(f"kind={kind} of TPM-CL is unknown; use one of {list(MARGINS_OF_KIND)}")
    check_matching(matching)
    if check_mask:
        empty = ~(to_host(frame_mask, "masks").numpy() > 0).any(axis=1)
        if empty.any():
            raise ValueError(f"frame_mask[{int(empty.argmax())}] has no valid slot for TPM-CL")
    chunk = pairs_per_chunk(chunk, (words.shape[1] + frames.shape[1]) * frames.shape[2])

    def similarities(*chunk_inputs: Tensor) -> tuple[Tensor, ...]:
        return _similarities(
            *chunk_inputs,
            frame_weight_layer=frame_weight_layer,
            both_ways=matching == "two_way",
            threshold=threshold,
            straight_through=straight_through,
            normalise_partial=normalise_partial,
        )

    pairs = (sentence, words, frames, frame_mask, word_weights, frame_weights)
    with no_autocast(frames.device):
        parts = run_in_chunks(similarities, pairs, chunk)
        hinges = {
            1: F.relu(parts[1] - parts[0] + margin),
            2: F.relu(parts[3] - parts[2] + margin),
            3: F.relu(parts[4] - parts[2] + margin),
        }
        hinge = sum((hinges[i] for i in MARGINS_OF_KIND[kind]), torch.zeros_like(parts[0]))
        return TpmCl(hinge, *parts)


def select_tokens(
    tokens: Float[Tensor, "B N D"],
    weights: Float[Tensor, "B N"],
    threshold: float = 0.6,
    *,
    straight_through: bool = False,
) -> tuple[Float[Tensor, "B N D"], Bool[Tensor, "B N"]]:
    """Zeroes the tokens of largest weight while their cumulative weight is below the threshold.

    Tokens are taken in order of falling weight, the lower index first among equal weights. The
    token that reaches the threshold is kept, so a first token at or above it drops nothing.

    Args:
        straight_through: Gives the selection the gradient of 1 - weight, instead of none: more
            weight means less of the token.

    Returns:
        The tokens, and the mask of those that were kept.
    """
    order = weights.detach().sort(dim=1, descending=True, stable=True)
    keep_in_order = order.values.cumsum(dim=1) >= threshold
    keep = torch.zeros_like(keep_in_order).scatter(1, order.indices, keep_in_order)
    factor = keep.to(tokens.dtype)
    if straight_through:
        factor = factor + (weights.detach() - weights).to(tokens.dtype)
    return tokens * factor[..., None], keep


def _similarities(
    sentence: Float[Tensor, "B D"],
    words: Float[Tensor, "B T D"],
    frames: Float[Tensor, "B F D"],
    frame_mask: Int[Tensor, "B F"],
    word_weights: Float[Tensor, "B T"],
    frame_weights: Float[Tensor, "B F"],
    *,
    frame_weight_layer: Callable[[Tensor], Tensor] | None,
    both_ways: bool,
    threshold: float,
    straight_through: bool,
    normalise_partial: bool,
) -> tuple[Tensor, ...]:
    """Similarities of B matched pairs, in the order of the fields of `TpmCl`."""
    # Converted per chunk, so that float32 copies of half-precision features are freed with it.
    sentence, words, frames = (at_least_float32(x) for x in (sentence, words, frames))
    word_weights, frame_weights = (at_least_float32(x) for x in (word_weights, frame_weights))
    partial_frames, _ = select_tokens(
        frames, frame_weights, threshold, straight_through=straight_through
    )
    kept_words, _ = select_tokens(words, word_weights, threshold, straight_through=straight_through)
    whole = unit(torch.einsum("bt,btd->bd", word_weights, words))
    part = torch.einsum("bt,btd->bd", word_weights, kept_words)
    part = unit(part) if normalise_partial else part

    video, partial_video = (
        (
            x.masked_fill((frame_mask == 0)[..., None], 0),
            _agg_weights(x, frame_mask, frame_weight_layer) if both_ways else None,
        )
        for x in (frames, partial_frames)  # dropped frames stay valid
    )
    return (
        _pair_similarity(sentence, *video),
        _pair_similarity(sentence, *partial_video),
        _pair_similarity(whole, *video),
        _pair_similarity(whole, *partial_video),
        _pair_similarity(part, *video),
    )


def _agg_weights(
    frames: Tensor, frame_mask: Tensor, frame_weight_layer: Callable[[Tensor], Tensor] | None
) -> Float[Tensor, "B F"]:
    if frame_weight_layer is None:
        share = frame_mask.to(frames.dtype)
        return share / share.sum(dim=1, keepdim=True)
    return masked_softmax(frame_weight_layer(frames).to(frames.dtype), frame_mask)


def _pair_similarity(x: Tensor, frames: Tensor, weights: Tensor | None) -> Float[Tensor, " B"]:
    scores = torch.einsum("bd,bfd->bf", x, frames)
    best = scores.max(dim=1).values
    return best if weights is None else (best + (weights * scores).sum(dim=1)) / 2
