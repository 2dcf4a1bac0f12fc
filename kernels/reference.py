"""The pair similarity of DMAE, written as plainly as its formulas (ACM MM 2023, arXiv 2309.11082).

This module defines the method. Every faster path is tested against it, forward and all gradients,
so it imports nothing of this package. Letters in the shapes of all modules here:

    A texts (rows of a similarity block)      C videos (its columns)
    B pairs on this rank                      G pairs on all ranks
    T words of a text                         F frames of a video
    L tokens of one token set: 1 for the sentence, T for the words
    N tokens and Q queries of a weight predictor
    D feature width

With x a text token, v a frame, and zero vectors in masked slots:

    S[a,t,c,f] = <x[a,t], v[c,f]>              p[a,t,c] = max_f S              q[a,c,f] = max_t S
    p[a,t,c] += 0.5 r[c,j] S[a,t,c,n[c,j]]     for the best frame j, its neighbour frame n (the
                                               other frame most similar to it) and r = <v_j, v_n>
    SIM(x)[a,c] = 1/2 (sum_t weight[a,t] p[a,t,c] + sum_f weight[c,f] q[a,c,f])

That is the matching `two_way`. `words_to_frames` is its text side alone, without the factor 1/2:

    SIM(x)[a,c] = sum_t weight[a,t] p[a,t,c]

With one frame set for all tokens, no neighbour frames and a sum instead of a weighted mean, this is
MaxSim, the late interaction of ColBERT (Khattab and Zaharia, SIGIR 2020, arXiv 2004.12832).

`ti` and `wti` are SIM(sentence); `att_ti` and `att_wti` are (SIM(sentence) + SIM(words)) / 2. Where
several entries share a maximum, the first one gets the gradient. A masked slot has similarity 0,
not -inf: it wins a maximum over negative similarities. One masked slot can therefore change a
score, but more of them change nothing.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

INTERACTIONS = ("ti", "wti", "att_ti", "att_wti")
MATCHINGS = ("two_way", "words_to_frames")


def dmae_similarity(
    sentence: Float[Tensor, "A D"] | None,
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
) -> Float[Tensor, "A C"]:
    """Computes the unscaled similarity of every text with every video, holding all A x T x C x F.

    The features have unit length (`numerics.unit`). Scores are weighted means of the best cosines
    and lie within +-1.25; within +-1 without neighbour frames. Words of mask 2 widen the range of
    `att_wti` to +-1.625, and to +-1.25 without neighbour frames. With `words_to_frames` the four
    ranges are +-1.5, +-1, +-2.25 and +-1.5.

    Args:
        sentence: Read by all interactions. None with `att_ti` or `att_wti` leaves the word part
            alone, SIM(words), which the method does not define.
        words: Read by `att_ti` and `att_wti`.
        word_mask: 0 for padding, 1 for a word, 2 for a word of double weight. The first slot is
            also the sentence's mask.
        frame_mask: 0 for padding, 1 for a frame.
        matching: `two_way`, or `words_to_frames` for the maxima over frames alone.
        word_logits: Outputs of `weight_layers.TokenWeightLayer`; read by `att_wti`. In `wti` the
            sentence is the only token and has weight 1.
        frame_logits: Outputs of such a layer for frames; read by `wti` and `att_wti`, but not with
            `words_to_frames`, where frames have no weights.

    Returns:
        Scores in float32, or float64 if an input is, also under autocast.

    Raises:
        ValueError: unknown interaction or matching, a missing tensor, shapes that disagree, mask
            values out of range, or a text or video without a valid slot.
    """
    has_words, weighted = interaction.startswith("att_"), interaction.endswith("wti")
    both_ways = matching == "two_way"
    tensors = {
        "sentence": sentence,
        "words": words if has_words else None,
        "frames": frames,
        "word_logits": word_logits if has_words and weighted else None,
        "frame_logits": frame_logits if weighted and both_ways else None,
    }
    _check_arguments(tensors, word_mask, frame_mask, interaction, matching)
    dtype = torch.float32
    for tensor in tensors.values():
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)

    with torch.autocast(frames.device.type, enabled=False):
        frames = torch.where(frame_mask[..., None] > 0, frames.to(dtype), 0)
        frame_weights = _weights(frame_mask, tensors["frame_logits"], dtype) if both_ways else None
        parts = []
        if sentence is not None:
            mask = word_mask[:, :1]
            weights = _weights(mask, torch.zeros_like(mask) if weighted else None, dtype)
            tokens = torch.where(mask[..., None] > 0, sentence[:, None].to(dtype), 0)
            parts.append(_set_similarity(tokens, weights, frames, frame_weights, neighbour_frames))
        if has_words and words is not None:
            weights = _weights(word_mask, tensors["word_logits"], dtype)
            tokens = torch.where(word_mask[..., None] > 0, words.to(dtype), 0)
            parts.append(_set_similarity(tokens, weights, frames, frame_weights, neighbour_frames))
        return sum(parts[1:], parts[0]) / len(parts)


def _weights(
    mask: Int[Tensor, "n L"], logits: Tensor | None, dtype: torch.dtype
) -> Float[Tensor, "n L"]:
    """Token weights: mask / sum of the mask; with logits, mask x softmax over valid slots."""
    share = mask.to(dtype)
    if logits is None:
        return share / share.sum(dim=1, keepdim=True)
    logits = torch.where(mask > 0, logits.to(dtype), -torch.inf)
    power = torch.exp(logits - logits.detach().amax(dim=1, keepdim=True))
    return share * power / power.sum(dim=1, keepdim=True)


def _set_similarity(
    tokens: Float[Tensor, "A L D"],
    weights: Float[Tensor, "A L"],
    frames: Float[Tensor, "C F D"],
    frame_weights: Float[Tensor, "C F"] | None,
    neighbour_frames: bool,
) -> Float[Tensor, "A C"]:
    """SIM of one token set; masked tokens and frames are zero vectors.

    Without frame weights it is the text side alone.
    """
    scores = torch.einsum("atd,cfd->atcf", tokens, frames)
    # max, not amax: amax would spread the gradient over equal entries, max gives it to the first.
    p, best_frame = scores.max(dim=3)
    q = None if frame_weights is None else scores.max(dim=1).values
    if neighbour_frames:
        # Gathers from expanded tables copy nothing, and their backward adds in a fixed order.
        strength, neighbour = _neighbours(frames)
        best_frame = best_frame[..., None]
        r = strength.expand_as(scores).gather(3, best_frame)
        n = neighbour.expand_as(scores).gather(3, best_frame)
        p = p + 0.5 * (r * scores.gather(3, n)).squeeze(3)
    text_part = torch.einsum("at,atc->ac", weights, p)
    if frame_weights is None or q is None:
        return text_part
    video_part = torch.einsum("cf,acf->ac", frame_weights, q)
    return (text_part + video_part) / 2


def _neighbours(
    frames: Float[Tensor, "C F D"],
) -> tuple[Float[Tensor, "C F"], Int[Tensor, "C F"]]:
    """Similarity r with, and index n of, the OTHER frame most similar to each frame.

    Neighbours are near in features, not in time. A frame's similarity with itself counts as 0.
    """
    itself = torch.eye(frames.shape[1], dtype=torch.bool, device=frames.device)
    correlation = torch.where(itself, 0, frames @ frames.transpose(1, 2))
    r, n = correlation.max(dim=2)
    return r, n


def _check_arguments(
    tensors: dict[str, Tensor | None],
    word_mask: Tensor,
    frame_mask: Tensor,
    interaction: str,
    matching: str,
) -> None:
    if interaction not in INTERACTIONS:
        raise ValueError(f"interaction={interaction!r} is unknown; use one of {INTERACTIONS}")
    if matching not in MATCHINGS:
        raise ValueError(f"matching={matching!r} is unknown; use one of {MATCHINGS}")
    has_words = interaction.startswith("att_")
    required = {
        "sentence": not has_words,
        "words": has_words,
        "word_logits": interaction == "att_wti",
        "frame_logits": interaction.endswith("wti") and matching == "two_way",
    }
    missing = [name for name, needed in required.items() if needed and tensors[name] is None]
    if missing:
        raise ValueError(f"interaction={interaction!r} needs {' and '.join(missing)}, not None")

    frames = tensors["frames"]
    if frames is None or frames.ndim != 3 or word_mask.ndim != 2:
        raise ValueError("frames must be (C, F, D) and word_mask (A, T)")
    texts, videos, width = tuple(word_mask.shape), tuple(frames.shape[:2]), frames.shape[2]
    expected = {
        "sentence": (*texts[:1], width),
        "words": (*texts, width),
        "word_logits": texts,
        "frame_logits": videos,
        "frame_mask": videos,
    }
    for name, shape in expected.items():
        tensor = frame_mask if name == "frame_mask" else tensors[name]
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} but must have {shape}")

    for name, mask, largest in (("word_mask", word_mask, 2), ("frame_mask", frame_mask, 1)):
        for row, values in enumerate(mask.tolist()):
            wrong = [slot for slot, value in enumerate(values) if not 0 <= value <= largest]
            if wrong:
                value = values[wrong[0]]
                raise ValueError(f"{name}[{row}, {wrong[0]}] is {value}, not 0 to {largest}")
            if not any(values):
                raise ValueError(f"{name}[{row}] has no valid slot")
            if name == "word_mask" and tensors["sentence"] is not None and not values[0]:
                raise ValueError(f"{name}[{row}, 0] is 0: pad on the right, slot 0 is the sentence")
