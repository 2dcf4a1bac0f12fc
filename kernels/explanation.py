"""The maxima behind one similarity: the frame of each word, the word of each frame, all weights.

The DMAE similarity of a text and a video is a weighted sum of maxima (`reference.py` has the
formulas). This module returns each term of that sum, so that a reader sees where a score comes
from. The terms add up to the score.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvr.kernels.device_transfer import to_host
from tvr.kernels.numerics import no_autocast
from tvr.kernels.partial import select_tokens
from tvr.kernels.token_sets import NEIGHBOUR_FACTOR, FrameSet, prepare


class TokenMaxima(NamedTuple):
    """What one token set, the sentence (L = 1) or the words (L = T), found in the frames."""

    similarity: Float[Tensor, "L F"]
    """Cosine of each token with each frame; 0 where one of them is padding."""
    best_frame: Int[Tensor, " L"]
    """First frame with the largest similarity. A padded frame has similarity 0 and can win."""
    best_token: Int[Tensor, " F"]
    """First token with the largest similarity to each frame. A padded token can win, too. It has no
    part in the score of `words_to_frames`."""
    weights: Float[Tensor, " L"]
    """Weight of each token in the similarity; 0 for all words if the interaction reads none."""
    token_terms: Float[Tensor, " L"]
    """Part of the score from each token's best frame and its neighbour."""
    neighbour_terms: Float[Tensor, " L"]
    """The neighbour's share of `token_terms`."""
    frame_terms: Float[Tensor, " F"]
    """Part of the score from each frame's best token; 0 with `words_to_frames`."""


class PairMaxima(NamedTuple):
    """All terms of the similarity of one text with one video."""

    sentence: TokenMaxima
    words: TokenMaxima | None
    """None if no words are given. Their terms are 0 if the interaction does not read words."""
    frame_weights: Float[Tensor, " F"]
    """Weight of each frame in the similarity; 0 with `words_to_frames`."""
    neighbour: Int[Tensor, " F"]
    """The OTHER frame most similar to each frame; the frame itself without neighbour frames."""
    neighbour_weight: Float[Tensor, " F"]
    """0.5 r: factor on the neighbour's similarity; 0 without neighbour frames."""
    removed_words: Bool[Tensor, " T"] | None
    """Words that TPM-CL's selector removes from this pair; None without a predictor."""
    removed_frames: Bool[Tensor, " F"] | None
    """Frames that TPM-CL's selector removes from this pair; None without a predictor."""
    score: Float[Tensor, ""]
    """The similarity: the sum of all terms."""


def pair_maxima(
    sentence: Float[Tensor, "A D"],
    words: Float[Tensor, "A T D"] | None,
    frames: Float[Tensor, "C F D"],
    word_mask: Int[Tensor, "A T"],
    frame_mask: Int[Tensor, "C F"],
    *,
    interaction: str = "att_wti",
    matching: str = "two_way",
    neighbour_frames: bool = True,
    word_logits: Float[Tensor, "A T"] | None = None,
    frame_logits: Float[Tensor, "C F"] | None = None,
    selector_word_weights: Float[Tensor, "A T"] | None = None,
    selector_frame_weights: Float[Tensor, "C F"] | None = None,
    threshold: float = 0.6,
) -> PairMaxima:
    """Computes every term of `dmae_similarity` for one text (A = 1) and one video (C = 1).

    Args:
        sentence, words, frames, word_mask, frame_mask, interaction, matching, neighbour_frames,
            word_logits, frame_logits: As in `similarity.dmae_similarity`. `ti` and `wti` accept
            words, too: their similarities and maxima are returned with weight 0.
        selector_word_weights: Outputs of TPM-CL's word predictor for this pair.
        selector_frame_weights: Outputs of its frame predictor.
        threshold: Of the selector; see `partial.select_tokens`.

    Returns:
        Tensors on the host, in float32, or in float64 if an input is.

    Raises:
        ValueError: as `dmae_similarity`, or there is not exactly one text and one video.
    """
    if len(word_mask) != 1 or len(frame_mask) != 1:
        raise ValueError(
            f"{len(word_mask)} texts and {len(frame_mask)} videos; an explanation takes one of each"
        )
    # On the host a maximum is the first of equal ones; a GPU does not promise that.
    sentence, frames = to_host(sentence, "features"), to_host(frames, "features")
    word_mask, frame_mask = to_host(word_mask, "masks"), to_host(frame_mask, "masks")
    words, word_logits, frame_logits = (
        None if x is None else to_host(x, "features") for x in (words, word_logits, frame_logits)
    )
    with torch.no_grad(), no_autocast(frames.device):
        reads_words = interaction.startswith("att_")
        texts, videos = prepare(
            sentence,
            words if reads_words else None,
            frames,
            word_mask,
            frame_mask,
            interaction=interaction,
            matching=matching,
            neighbour_frames=neighbour_frames,
            word_logits=word_logits,
            frame_logits=frame_logits,
        )
        parts = len(texts)
        found = [
            _maxima(text.without_padding()[0], text.weights[0], videos, parts) for text in texts
        ]
        if words is not None and not reads_words:
            tokens = words.to(videos.frames.dtype).masked_fill((word_mask == 0)[..., None], 0)[0]
            unread = _maxima(tokens, tokens.new_zeros(len(tokens)), videos, parts)
            found.append(unread._replace(frame_terms=torch.zeros_like(unread.frame_terms)))
        score = sum(
            (x.token_terms.sum() + x.frame_terms.sum() for x in found), frames.new_zeros(())
        )
        itself = torch.arange(frames.shape[1])
        return PairMaxima(
            sentence=found[0],
            words=found[1] if len(found) > 1 else None,
            frame_weights=_frame_weights(videos),
            neighbour=itself if videos.neighbour is None else videos.neighbour[0],
            neighbour_weight=_neighbour_weight(videos),
            removed_words=_removed(selector_word_weights, threshold),
            removed_frames=_removed(selector_frame_weights, threshold),
            score=score.to(videos.frames.dtype),
        )


def _maxima(
    tokens: Float[Tensor, "L D"], weights: Float[Tensor, " L"], videos: FrameSet, parts: int
) -> TokenMaxima:
    """The maxima of one token set, whose SIM is one of `parts` that the score averages."""
    scores = tokens @ videos.frames[0].T
    best, best_frame = scores.max(dim=1)
    of_frames, best_token = scores.max(dim=0)
    helped = torch.zeros_like(best)
    if videos.neighbour is not None:
        neighbour = videos.neighbour[0][best_frame]
        helped = _neighbour_weight(videos)[best_frame] * scores.gather(1, neighbour[:, None])[:, 0]
    # A half each of the score's two sides; or one side that is the whole score.
    share = parts if videos.weights is None else 2 * parts
    return TokenMaxima(
        similarity=scores,
        best_frame=best_frame,
        best_token=best_token,
        weights=weights,
        token_terms=weights * (best + helped) / share,
        neighbour_terms=weights * helped / share,
        frame_terms=_frame_weights(videos) * of_frames / share,
    )


def _frame_weights(videos: FrameSet) -> Float[Tensor, " F"]:
    return torch.zeros_like(videos.frames[0, :, 0]) if videos.weights is None else videos.weights[0]


def _neighbour_weight(videos: FrameSet) -> Float[Tensor, " F"]:
    if videos.strength is None:
        return torch.zeros_like(videos.frames[0, :, 0])
    return NEIGHBOUR_FACTOR * videos.strength[0]


def _removed(weights: Tensor | None, threshold: float) -> Bool[Tensor, " N"] | None:
    if weights is None:
        return None
    weights = to_host(weights, "features")
    return ~select_tokens(weights[..., None], weights, threshold)[1][0]
