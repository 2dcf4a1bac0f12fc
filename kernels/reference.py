"""The method's pair similarity, as plain as its formulas: every faster path must equal this one.

The method is DMAE (ACM MM 2023, arXiv 2309.11082). Letters used in every shape of this package:

    A texts (rows of a similarity block)      C videos (its columns)
    B pairs on this rank                      G pairs on all ranks
    T words of a text                         F frames of a video
    L tokens of one token set: 1 for the sentence, T for the words
    N tokens and Q queries of a weight predictor
    D feature width

With x a text token, v a frame and masked slots replaced by zero vectors,

    S[a,t,c,f] = <x[a,t], v[c,f]>              p[a,t,c] = max_f S              q[a,c,f] = max_t S
    p[a,t,c] += 0.5 r[c,j] S[a,t,c,n[c,j]]     with j the frame of the maximum, n[c,j] the other
                                               frame most like it and r their similarity
    SIM(x)[a,c] = 1/2 (sum_t weight[a,t] p[a,t,c] + sum_f weight[c,f] q[a,c,f])

`ti` and `wti` are SIM(sentence); `att_ti` and `att_wti` are (SIM(sentence) + SIM(words)) / 2.
A maximum belongs to its first argument. A masked slot counts as similarity 0, not -inf: it wins
where every valid similarity is negative, so one padded slot matters but their number does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvr.kernels.checks import check_mask, check_presence, check_shapes

NEIGHBOUR_FACTOR = 0.5
SHORTEST = 1e-12


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
) -> Float[Tensor, "A C"]:
    """Unscaled similarity of every text with every video, in one naive piece (method section 2).

    Features have unit length (`unit`). `word_mask` is 0 for padding, 1 for a token, 2 for a token
    of double weight; its first slot is the sentence's mask. `frame_mask` is 0 or 1. Logits are the
    outputs of `layers.TokenWeightLayer`; only the wti family reads them, and `wti` reads no
    `word_logits`, the sentence being one token of weight 1.

    `ti` and `wti` read the sentence only: `words` may be None. `att_ti` and `att_wti` read both;
    with `sentence` None they are the word part alone, SIM(words), which the method does not have.

    Scores are float32, or float64 if an input is; autocast does not reach them. They are means of
    the best cosines, and go beyond 1 by what neighbours and double weights add: within +-1.25, and
    +-1.625 with double weights in `att_wti`; +-1 without neighbours, +-1.25 with double weights.

    Raises:
        ValueError: unknown interaction, a tensor that it needs is missing, shapes that disagree,
            mask values out of range, or a text or video without any valid slot.
    """
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
        return block_similarity(texts, videos)


def unit(x: Float[Tensor, "*rest D"]) -> Float[Tensor, "*rest D"]:
    """x / |x| over the last dimension, in float32 at least.

    A vector no longer than 1e-12 has no direction: it becomes 0 and gets gradient 0, not the
    1e12-fold gradient of a division by the bound.
    """
    x = raised(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(length > SHORTEST, x / length.clamp_min(SHORTEST), torch.zeros_like(x))


def raised(x: Tensor) -> Tensor:
    """x in float32 at least: half precisions are raised, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keeps autocast out: a bfloat16 step near 0.3 is 0.2 in a logit at scale 100."""
    with torch.autocast(device.type, enabled=False):
        yield


class TokenSet(NamedTuple):
    """The sentence (L = 1) or the words (L = T) of A texts; `valid` tells tokens from padding."""

    tokens: Float[Tensor, "A L D"]
    weights: Float[Tensor, "A L"]
    valid: Bool[Tensor, "A L"]

    def without_padding(self) -> Float[Tensor, "A L D"]:
        """The tokens, zero vectors where there is none."""
        return self.tokens.masked_fill(~self.valid[..., None], 0)


class FrameSet(NamedTuple):
    """The frames of C videos; masked frames are zero vectors.

    `neighbour` is the index of each frame's neighbour and `strength` their correlation, both None
    without neighbour frames.
    """

    frames: Float[Tensor, "C F D"]
    weights: Float[Tensor, "C F"]
    strength: Float[Tensor, "C F"] | None
    neighbour: Int[Tensor, "C F"] | None


def prepare(
    sentence: Tensor | None,
    words: Tensor | None,
    frames: Tensor,
    word_mask: Tensor,
    frame_mask: Tensor,
    *,
    interaction: str,
    neighbour_frames: bool,
    word_logits: Tensor | None,
    frame_logits: Tensor | None,
) -> tuple[tuple[TokenSet, ...], FrameSet]:
    """Checks the arguments of `dmae_similarity` and computes what is of one text or video alone."""
    weighted = interaction.endswith("wti")
    if interaction in ("ti", "wti"):
        words = word_logits = None
    if not weighted:
        word_logits = frame_logits = None
    check_presence(interaction, sentence, words, word_logits, frame_logits)
    check_shapes(sentence, words, frames, word_mask, frame_mask, word_logits, frame_logits)
    check_mask("word_mask", word_mask, largest=2, sentence=sentence is not None)
    check_mask("frame_mask", frame_mask, largest=1, sentence=False)

    dtype = torch.float32
    for tensor in (sentence, words, frames, word_logits, frame_logits):
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    texts = []
    if sentence is not None:
        mask = word_mask[:, :1]
        logits = torch.zeros_like(mask, dtype=dtype) if weighted else None
        texts.append(_token_set(sentence[:, None].to(dtype), mask, logits))
    if words is not None:
        texts.append(_token_set(words.to(dtype), word_mask, word_logits))
    of_video = _token_set(frames.to(dtype), frame_mask, frame_logits)
    frames = of_video.without_padding()
    correlation = _neighbours(frames) if neighbour_frames else (None, None)
    return tuple(texts), FrameSet(frames, of_video.weights, *correlation)


def block_similarity(texts: tuple[TokenSet, ...], videos: FrameSet) -> Float[Tensor, "A C"]:
    """Mean over the token sets of SIM(token set), for one block of texts and videos."""
    return torch.stack([_set_similarity(tokens, videos) for tokens in texts]).mean(dim=0)


def _set_similarity(texts: TokenSet, videos: FrameSet) -> Float[Tensor, "A C"]:
    scores = torch.einsum("atd,cfd->atcf", texts.without_padding(), videos.frames)
    # max, not amax: amax would share the gradient among equal entries instead of the first.
    best_of_frames, best_frame = scores.max(dim=3)
    best_of_tokens = scores.max(dim=1).values
    if videos.strength is not None and videos.neighbour is not None:
        # p + 0.5 r S[., n] with r and n those of the best frame. Gathers from expanded tables cost
        # no copy, and their backward adds in a fixed order, unlike one through flat indices.
        best_frame = best_frame[..., None]
        strength = videos.strength.expand_as(scores).gather(3, best_frame)
        neighbour = videos.neighbour.expand_as(scores).gather(3, best_frame)
        related = strength * scores.gather(3, neighbour)
        best_of_frames = best_of_frames + NEIGHBOUR_FACTOR * related.squeeze(3)
    text_part = torch.einsum("at,atc->ac", texts.weights, best_of_frames)
    video_part = torch.einsum("cf,acf->ac", videos.weights, best_of_tokens)
    return (text_part + video_part) / 2


def masked_softmax(logits: Float[Tensor, "n L"], mask: Int[Tensor, "n L"]) -> Float[Tensor, "n L"]:
    """Softmax over the slots whose mask is not 0; 0 in the others."""
    return logits.masked_fill(mask == 0, -torch.inf).softmax(dim=-1)


def _token_set(tokens: Tensor, mask: Tensor, logits: Tensor | None) -> TokenSet:
    """Weights: the mask over its sum (ti family), or mask x softmax (wti family).

    A token of mask 2 counts twice in both. The first renormalises; the second does not, so its
    weights sum to between 1 and 2.
    """
    share = mask.to(tokens.dtype)
    if logits is None:
        weights = share / share.sum(dim=1, keepdim=True)
    else:
        weights = share * masked_softmax(logits.to(tokens.dtype), mask)
    return TokenSet(tokens, weights, mask > 0)


def _neighbours(
    frames: Float[Tensor, "C F D"],
) -> tuple[Float[Tensor, "C F"], Int[Tensor, "C F"]]:
    """Of each frame the similarity r with the OTHER frame most like it, and that frame's index n.

    A neighbour in feature space, not in time. The diagonal is set to 0, so a frame whose others
    are all dissimilar (or padding) has r = 0 and neighbour frames change nothing for it.
    """
    correlation = torch.einsum("cfd,cgd->cfg", frames, frames)
    itself = torch.eye(frames.shape[1], dtype=torch.bool, device=frames.device)
    strength, neighbour = correlation.masked_fill(itself, 0).max(dim=2)
    return strength, neighbour
