"""Inputs of the similarity, prepared once per text and once per video.

Every fast path scores a `TokenSet` (the sentences or the words of A texts) against a `FrameSet`
(the frames of C videos). `reference.py` computes the same quantities with code of its own, so that
a mistake here shows in the parity tests.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvr.kernels.checks import check_presence, check_shapes
from tvr.kernels.device_transfer import to_host
from tvr.kernels.numerics import masked_softmax
from tvr.kernels.text_lengths import TextLengths, host_lengths

NEIGHBOUR_FACTOR = 0.5


class TokenSet(NamedTuple):
    """Tokens of A texts: the sentence (L = 1) or the words (L = T)."""

    tokens: Float[Tensor, "A L D"]
    weights: Float[Tensor, "A L"]
    valid: Bool[Tensor, "A L"]
    """False for padding."""
    lengths: TextLengths | None = None
    """The same on the host; None if only the device knows."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, weights and validity."""
        return self[:3]

    def without_padding(self) -> Float[Tensor, "A L D"]:
        """The tokens, with zero vectors in padded slots."""
        return self.tokens.masked_fill(~self.valid[..., None], 0)


class FrameSet(NamedTuple):
    """Frames of C videos; masked frames are zero vectors."""

    frames: Float[Tensor, "C F D"]
    weights: Float[Tensor, "C F"] | None
    """None for `words_to_frames`, where frames choose no tokens."""
    strength: Float[Tensor, "C F"] | None
    """Similarity of each frame with its neighbour frame; None without neighbour frames."""
    neighbour: Int[Tensor, "C F"] | None
    """Index of each frame's neighbour frame; None without neighbour frames."""


def prepare(
    sentence: Tensor | None,
    words: Tensor | None,
    frames: Tensor,
    word_mask: Tensor,
    frame_mask: Tensor,
    *,
    interaction: str,
    matching: str = "two_way",
    neighbour_frames: bool,
    word_logits: Tensor | None,
    frame_logits: Tensor | None,
    lengths: TextLengths | None = None,
) -> tuple[tuple[TokenSet, ...], FrameSet]:
    """Checks the arguments of `dmae_similarity` and computes weights and neighbour frames.

    Args:
        lengths: Of the words, from `host_lengths`, which has checked both masks. None reads the
            masks, and the host waits for their device.

    Returns:
        One token set for `ti` and `wti`, sentence and words for the `att_` interactions; and the
        frames. All are in float32, or float64 if an input is.

    Raises:
        ValueError: as `similarity.dmae_similarity`.
    """
    weighted = interaction.endswith("wti")
    if interaction in ("ti", "wti"):
        words = word_logits = None
    if not weighted:
        word_logits = frame_logits = None
    both_ways = matching == "two_way"
    if not both_ways:
        frame_logits = None
    check_presence(interaction, matching, sentence, words, word_logits, frame_logits)
    check_shapes(sentence, words, frames, word_mask, frame_mask, word_logits, frame_logits)
    if lengths is None:
        masks = (to_host(mask, "masks") for mask in (word_mask, frame_mask))
        lengths = host_lengths(*masks, sentence=sentence is not None)
    elif len(lengths.ends) != len(word_mask):
        raise ValueError(
            f"lengths has {len(lengths.ends)} texts but must have {len(word_mask)}, from word_mask"
        )

    dtype = torch.float32
    for tensor in (sentence, words, frames, word_logits, frame_logits):
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    texts = []
    if sentence is not None:
        mask = word_mask[:, :1]
        logits = torch.zeros_like(mask, dtype=dtype) if weighted else None
        one_each = (1,) * len(mask)
        of_sentences = TextLengths(one_each, one_each)
        texts.append(_token_set(sentence[:, None].to(dtype), mask, logits, of_sentences))
    if words is not None:
        texts.append(_token_set(words.to(dtype), word_mask, word_logits, lengths))
    video = _token_set(frames.to(dtype), frame_mask, frame_logits)
    frames = video.without_padding()
    neighbours = _neighbours(frames) if neighbour_frames else (None, None)
    return tuple(texts), FrameSet(frames, video.weights if both_ways else None, *neighbours)


def _token_set(
    tokens: Tensor, mask: Tensor, logits: Tensor | None, lengths: TextLengths | None = None
) -> TokenSet:
    """Adds the weights: mask / sum of the mask (ti family), or mask x softmax (wti family).

    A word of mask 2 counts twice in both. Only the ti family renormalises, so the weights of the
    wti family sum to between 1 and 2.
    """
    share = mask.to(tokens.dtype)
    if logits is None:
        weights = share / share.sum(dim=1, keepdim=True)
    else:
        weights = share * masked_softmax(logits.to(tokens.dtype), mask)
    return TokenSet(tokens, weights, mask > 0, lengths)


def _neighbours(
    frames: Float[Tensor, "C F D"],
) -> tuple[Float[Tensor, "C F"], Int[Tensor, "C F"]]:
    """Finds each frame's neighbour: the OTHER frame most similar to it, in features, not in time.

    The diagonal counts as 0. A frame whose other frames are all dissimilar, or padding, therefore
    gets strength 0, and neighbour frames change nothing for it.
    """
    correlation = torch.einsum("cfd,cgd->cfg", frames, frames)
    itself = torch.eye(frames.shape[1], dtype=torch.bool, device=frames.device)
    strength, neighbour = correlation.masked_fill(itself, 0).max(dim=2)
    return strength, neighbour
