"""TPM-CL: a matched pair must beat its own partial versions, robbed of their weightiest tokens.

Token weights come from a predictor that sees the other modality; the selector drops the tokens
that carry the most weight; margins then compare the whole pair with the robbed one. Only matched
pairs enter the loss, so only those are computed: O(B) where all pairs would be O(B^2).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tvr.kernels.reference import full_precision, masked_softmax, raised, unit

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

    Raises:
        ValueError: unknown kind, or a video without any valid frame.
    """
    if kind not in MARGINS_OF_KIND:
        raise ValueError(f"kind={kind} of TPM-CL is unknown; use one of {list(MARGINS_OF_KIND)}")
    empty = (frame_mask > 0).sum(dim=1) == 0
    if bool(empty.any()):
        raise ValueError(f"frame_mask[{int(empty.nonzero()[0, 0])}] has no valid slot in TPM-CL")
    with full_precision(frames.device):
        sentence, words, frames = raised(sentence), raised(words), raised(frames)
        word_weights, frame_weights = raised(word_weights), raised(frame_weights)
        partial_frames, _ = select_tokens(
            frames, frame_weights, threshold, straight_through=straight_through
        )
        kept_words, _ = select_tokens(
            words, word_weights, threshold, straight_through=straight_through
        )
        whole = unit(torch.einsum("bt,btd->bd", word_weights, words))
        part = torch.einsum("bt,btd->bd", word_weights, kept_words)
        part = unit(part) if normalise_partial else part

        video = _video(frames, frame_mask, frame_weight_layer)
        partial_video = _video(partial_frames, frame_mask, frame_weight_layer)
        pairs = [
            _pair_similarity(sentence, *video),
            _pair_similarity(sentence, *partial_video),
            _pair_similarity(whole, *video),
            _pair_similarity(whole, *partial_video),
            _pair_similarity(part, *video),
        ]
        hinges = {
            1: F.relu(pairs[1] - pairs[0] + margin),
            2: F.relu(pairs[3] - pairs[2] + margin),
            3: F.relu(pairs[4] - pairs[2] + margin),
        }
        hinge = sum((hinges[i] for i in MARGINS_OF_KIND[kind]), torch.zeros_like(pairs[0]))
        return TpmCl(hinge, *pairs)


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


class LinearTokenWeights(nn.Module):
    """Weights over N tokens (they sum to 1) given Q tokens of the other modality; the kind in use.

    The queries are mixed to one for each token, put before it, normalised over tokens and
    features together, and reduced to a sigmoid (the method, section 4). Q and N are fixed: all
    slots count, padding too, as published. A `token_mask` takes the weight from padding instead.
    """

    def __init__(self, num_queries: int, num_tokens: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(num_queries, num_tokens, bias=False)
        self.norm = nn.LayerNorm([num_tokens, 2 * width])
        self.hidden = nn.Linear(2 * width, width // 2, bias=False)
        self.score = nn.Linear(width // 2, 1, bias=False)

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        tokens: Float[Tensor, "B N D"],
        token_mask: Int[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B N"]:
        num_tokens, num_queries = self.mix.weight.shape
        _check_slots("queries", queries, num_queries)
        _check_slots("tokens", tokens, num_tokens)
        dtype = self.mix.weight.dtype
        mixed = self.mix(queries.to(dtype).transpose(1, 2)).transpose(1, 2)
        pairs = self.norm(torch.cat([mixed, tokens.to(dtype)], dim=2))
        share = raised(self.score(F.gelu(self.hidden(pairs)))).squeeze(2).sigmoid()
        if token_mask is not None:
            share = share.masked_fill(token_mask == 0, 0)
        return share / share.sum(dim=1, keepdim=True)


class AttentionTokenWeights(nn.Module):
    """Weights over tokens from the attention of Q queries of the other modality.

    Each of 8 heads spreads every query over the tokens by softmax(q . k), not scaled by
    1 / sqrt(d); `reduce` ("sum", "mean", "max") joins the heads, Linear(Q, 1) the queries, and a
    softmax over tokens follows. With a `token_mask` padding is left out of both softmaxes.

    Raises:
        ValueError: unknown `reduce`, or a width that is no multiple of `heads`.
    """

    def __init__(
        self, num_queries: int, width: int, *, heads: int = 8, reduce: str = "sum"
    ) -> None:
        super().__init__()
        if reduce not in ("sum", "mean", "max"):
            raise ValueError(f"reduce={reduce!r} of the heads is unknown; use 'sum', 'mean', 'max'")
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}")
        self.heads = heads
        self.reduce = reduce
        self.join = nn.Linear(num_queries, 1)

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        tokens: Float[Tensor, "B N D"],
        token_mask: Int[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B N"]:
        _check_slots("queries", queries, self.join.in_features)
        by_head = [x.unflatten(2, (self.heads, -1)) for x in (queries, tokens)]
        scores = torch.einsum("bqhd,bnhd->bhqn", *by_head)
        if token_mask is not None:
            scores = scores.masked_fill((token_mask == 0)[:, None, None], -torch.inf)
        spread = scores.softmax(dim=3)
        if self.reduce == "max":
            spread = spread.max(dim=1).values
        else:
            spread = spread.sum(dim=1) if self.reduce == "sum" else spread.mean(dim=1)
        joined = self.join(spread.transpose(1, 2).to(self.join.weight.dtype)).squeeze(2)
        if token_mask is None:
            return raised(joined).softmax(dim=1)
        return masked_softmax(raised(joined), token_mask)


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


def _check_slots(name: str, x: Tensor, expected: int) -> None:
    if x.shape[1] != expected:
        raise ValueError(
            f"{name} has {x.shape[1]} slots but this predictor was built for {expected}: "
            "the number of words and frames per sample is fixed"
        )
