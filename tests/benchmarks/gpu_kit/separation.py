"""Pairs whose maxima are clear: no second entry comes close to the largest.

Where two entries of a maximum are nearly equal, rounding decides which of them gets the gradient.
Both answers are right, and they differ by a whole row. Such pairs are left out of a comparison of
gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clear_pairs(
    arguments: dict[str, Tensor], interaction: str, neighbour_frames: bool, gap: float
) -> Tensor:
    """(A, C) booleans: all maxima of the pair lead by more than `gap`.

    Args:
        arguments: Of `dmae_similarity`; a masked slot counts as similarity 0, once.
    """
    valid_words, valid_frames = arguments["word_mask"] > 0, arguments["frame_mask"] > 0
    frames = arguments["frames"].masked_fill(~valid_frames[..., None], 0)
    sets = [(arguments["sentence"][:, None], valid_words[:, :1])]
    if interaction.startswith("att_"):
        sets.append((arguments["words"], valid_words))
    clear = torch.ones(len(valid_words), len(frames), dtype=torch.bool, device=frames.device)
    for tokens, valid in sets:
        tokens = tokens.masked_fill(~valid[..., None], 0)
        scores = torch.einsum("atd,cfd->atcf", tokens, frames)
        leads = _lead(scores, valid_frames[None, None]) > gap  # (A, T, C)
        clear &= (leads | ~valid[..., None]).all(dim=1)
        leads = _lead(scores.permute(0, 2, 3, 1), valid[:, None, None]) > gap  # (A, C, F)
        clear &= (leads | ~valid_frames).all(dim=2)
    if neighbour_frames:
        correlation = torch.einsum("cfd,cgd->cfg", frames, frames)
        itself = torch.eye(frames.shape[1], dtype=torch.bool, device=frames.device)
        leads = _lead(correlation, valid_frames[:, None] & ~itself) > gap  # (C, F)
        clear &= (leads | ~valid_frames).all(dim=1)
    return clear


def _lead(scores: Tensor, valid: Tensor) -> Tensor:
    """How far the largest entry along the last dimension is above the second largest.

    Slots that are not valid are together one entry, 0.
    """
    valid = valid.expand_as(scores)
    zero = torch.where(valid.all(dim=-1, keepdim=True), -torch.inf, 0.0).to(scores.dtype)
    entries = torch.cat([scores.masked_fill(~valid, -torch.inf), zero], dim=-1)
    first, second = entries.topk(2, dim=-1).values.unbind(dim=-1)
    return first - second
