"""TPM-CL: a matched pair must beat its own partial versions, robbed of their weightiest tokens.

Token weights come from a predictor that sees the other modality; the selector drops the tokens
that carry the most weight; margins then compare the whole pair with the robbed one. Only matched
pairs enter the loss, so only those are computed, in pieces: O(B) work where all pairs would be
O(B^2), and O(1) memory beyond the inputs and their gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvr.kernels.checkpointed_chunks import chunk_size, in_pieces
from tvr.kernels.reference import full_precision, masked_softmax, raised, unit
from tvr.kernels.token_weights import AttentionTokenWeights, LinearTokenWeights

__all__ = ["AttentionTokenWeights", "LinearTokenWeights", "TpmCl", "select_tokens", "tpm_cl"]

# The margins that each kind sums; kind 1 computes the similarities and adds nothing to the loss.
MARGINS_OF_KIND = {1: (), 2: (1, 2), 3: (3,), 4: (1, 2, 3)}


@dataclass(frozen=True)
class TpmCl:
    """Per matched pair: the hinge (the caller averages it over the global batch) and its parts.

    `whole_words` and `partial_words` stand for the weighted sum of all words and of the kept
    words; `partial_frames` for the video without its dropped frames.
    """

    hinge: Float[Tensor, " B"]
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
    kind: int = 4,
    threshold: float = 0.6,
    margin: float = 0.6,
    straight_through: bool = False,
    normalise_partial: bool = False,
    chunk: int | None = None,
) -> TpmCl:
    """Triplet partial margins of B matched pairs (the method, section 4).

    With s(x, video) = 1/2 (max_f S + agg_f S) the margins are
        1: s(sentence, partial frames) must lie `margin` below s(sentence, frames),
        2: the same for the whole words,  3: s(partial words, frames) below s(whole words, frames).
    `kind` 2 sums margins 1 and 2, 3 takes margin 3, 4 all three, 1 none. agg is the mean over
    valid frames with `frame_weight_layer` None (ti family), else a softmax of its logits, taken
    anew for the partial video (wti family); neither neighbour frames nor word masks enter.

    Weights are the outputs of the predictors: `word_weights` for the frames as queries,
    `frame_weights` for the sentence. As published the frame weights act through the hard choice
    only and their predictor never learns; `straight_through` gives the choice of frames and words
    a gradient (`select_tokens`). As published the partial words are no unit vector, so margin 3
    is partly met by their length alone; `normalise_partial` makes them one.

    Memory: pieces of `chunk` pairs, whose insides are recomputed in the backward; the result is
    the same for every `chunk`. None takes the largest pieces whose words and frames have at most
    `pieces.ENTRIES_PER_PIECE` entries. `frame_weight_layer` sees the frames of one piece at a
    time, and again in the backward: it must weigh each frame by itself and draw nothing at random.

    Raises:
        ValueError: unknown kind, a chunk below 1, or a video without any valid frame.
    """
    if kind not in MARGINS_OF_KIND:
        raise ValueError(f"kind={kind} of TPM-CL is unknown; use one of {list(MARGINS_OF_KIND)}")
    empty = (frame_mask > 0).sum(dim=1) == 0
    if bool(empty.any()):
        raise ValueError(f"frame_mask[{int(empty.nonzero()[0, 0])}] has no valid slot in TPM-CL")
    chunk = chunk_size(chunk, (words.shape[1] + frames.shape[1]) * frames.shape[2])

    def similarities(*piece: Tensor) -> tuple[Tensor, ...]:
        return _similarities(
            *piece,
            frame_weight_layer=frame_weight_layer,
            threshold=threshold,
            straight_through=straight_through,
            normalise_partial=normalise_partial,
        )

    pairs = (sentence, words, frames, frame_mask, word_weights, frame_weights)
    with full_precision(frames.device):
        parts = in_pieces(similarities, pairs, chunk)
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
    """Zeroes the weightiest tokens while their cumulative weight stays below the threshold.

    In falling order of weight (equal weights: lower index first) the tokens are dropped up to but
    without the one that reaches the threshold: a first token at or above it drops nothing.
    Returns the tokens and which were kept. The choice has no gradient; with `straight_through`
    the kept-or-zero factor gets that of 1 - weight (more weight, less of the token).
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
    threshold: float,
    straight_through: bool,
    normalise_partial: bool,
) -> tuple[Tensor, ...]:
    """The similarities of B matched pairs, in the order of the fields of `TpmCl`."""
    # Raised here, so that the copies of half-precision features last no longer than the piece.
    sentence, words, frames = raised(sentence), raised(words), raised(frames)
    word_weights, frame_weights = raised(word_weights), raised(frame_weights)
    partial_frames, _ = select_tokens(
        frames, frame_weights, threshold, straight_through=straight_through
    )
    kept_words, _ = select_tokens(words, word_weights, threshold, straight_through=straight_through)
    whole = unit(torch.einsum("bt,btd->bd", word_weights, words))
    part = torch.einsum("bt,btd->bd", word_weights, kept_words)
    part = unit(part) if normalise_partial else part

    video = _video(frames, frame_mask, frame_weight_layer)
    partial_video = _video(partial_frames, frame_mask, frame_weight_layer)
    return (
        _pair_similarity(sentence, *video),
        _pair_similarity(sentence, *partial_video),
        _pair_similarity(whole, *video),
        _pair_similarity(whole, *partial_video),
        _pair_similarity(part, *video),
    )


def _video(
    frames: Tensor, frame_mask: Tensor, frame_weight_layer: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Frames with masked ones zeroed, and their weights in agg. Dropped frames stay valid."""
    if frame_weight_layer is None:
        share = frame_mask.to(frames.dtype)
        weights = share / share.sum(dim=1, keepdim=True)
    else:
        weights = masked_softmax(frame_weight_layer(frames).to(frames.dtype), frame_mask)
    return frames.masked_fill((frame_mask == 0)[..., None], 0), weights


def _pair_similarity(x: Tensor, frames: Tensor, weights: Tensor) -> Float[Tensor, " B"]:
    scores = torch.einsum("bd,bfd->bf", x, frames)
    return (scores.max(dim=1).values + (weights * scores).sum(dim=1)) / 2
