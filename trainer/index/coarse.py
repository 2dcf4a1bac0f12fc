"""The vectors of the first stage: one of a video and one of a query, of unit length.

DMAE's similarity is a mean of maxima: the best frame of each word, the best word of each frame. If
every maximum is replaced by the weighted mean of its entries, and neighbour frames are left out,
it becomes one product: of the video's weighted mean frame with the mean of the sentence and the
weighted mean word. A maximum is never below the mean, so this product is a lower bound where the
weights add up to 1. The weights are those of the similarity. With `words_to_frames` only the words'
maxima are replaced; frames have no weights there and count equally.

Both vectors are scaled to unit length. The length of a query's does not change its ranking. That of
a video's is small if its frames differ, and just then the maxima lie far above the mean. For
`att_ti` and `att_wti` the sentence alone is a poor query: the words count as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tvr.kernels.numerics import masked_softmax, unit
from tvr.trainer.model.model import Features


def video_vectors(videos: Features, interaction: str) -> Tensor:
    """Coarse vectors (C, D) of videos, in fp32."""
    weights = _weights(videos.frame_mask, videos.frame_logits, interaction.endswith("wti"))
    frames = videos.frames.float() * (videos.frame_mask > 0)[..., None]
    return unit(torch.einsum("cf,cfd->cd", weights, frames))


def query_vectors(texts: Features, interaction: str) -> Tensor:
    """Coarse vectors (A, D) of captions, in fp32."""
    sentence = texts.sentence.float()
    if not interaction.startswith("att_"):
        return unit(sentence)
    weights = _weights(texts.word_mask, texts.word_logits, interaction.endswith("wti"))
    words = texts.words.float() * (texts.word_mask > 0)[..., None]
    return unit(sentence + torch.einsum("at,atd->ad", weights, words))


def _weights(mask: Tensor, logits: Tensor | None, weighted: bool) -> Tensor:
    """Weights of tokens, as in `token_sets`."""
    share = mask.float()
    if weighted and logits is not None:
        return share * masked_softmax(logits.float(), mask)
    return share / share.sum(dim=1, keepdim=True)
