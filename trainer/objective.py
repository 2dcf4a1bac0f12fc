"""The loss of the global batch from one rank's features: its texts against everyone's frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tvr.kernels.losses import LossTerms, row_info_nce, row_neg_nce
from tvr.kernels.similarity import dmae_similarity
from tvr.trainer.config import LossConfig, ModelConfig
from tvr.trainer.gather import collectives_of, gather_rows
from tvr.trainer.model import Features
from tvr.trainer.world import World


@dataclass(frozen=True, slots=True)
class Objective:
    """One rank's part of a step's loss.

    `for_backward` carries the gradient, already scaled for an engine that averages over ranks.
    `shares` are without gradient, in the order of SHARES; their sums over ranks are the values of
    the global batch.
    """

    for_backward: Tensor
    shares: Tensor


SHARES = ("loss", "similarity_loss", "tpm_cl_loss", "hard_negatives_per_row", "clamped_share")


def objective(
    mine: Features, video_ids: Tensor, model: ModelConfig, loss: LossConfig, world: World
) -> Objective:
    """Similarity loss plus TPM-CL over the global batch (the method, sections 3 and 4).

    `mine` are the features of this rank's B pairs, `video_ids` (B,) theirs. Only the frames, the
    shorter side, are gathered; the (B, G) block of similarities is this rank's alone.
    """
    block = similarity_rows(mine, gathered_videos(mine, world), model)
    terms = similarity_loss(block, gather_rows(video_ids, world), loss, world)
    margin = terms.loss.new_zeros(())
    if mine.margin_hinge is not None:
        margin = mine.margin_hinge.sum() / block.shape[1]
    share = terms.loss + loss.tpm_cl_weight * margin
    shares = [share, terms.loss, margin, terms.hard_per_row, terms.clamped_share]
    return Objective(
        for_backward=share * world.world_size,  # the scale rule: see gather.py
        shares=torch.stack([x.detach() for x in shares]),
    )


def gathered_videos(mine: Features, world: World) -> Features:
    """`mine` with the frames, frame masks and frame logits of all ranks, in rank order."""
    logits = mine.frame_logits
    return mine._replace(
        frames=gather_rows(mine.frames, world),
        frame_mask=gather_rows(mine.frame_mask, world),
        frame_logits=None if logits is None else gather_rows(logits, world),
    )


def similarity_rows(texts: Features, videos: Features, model: ModelConfig) -> Tensor:
    """Similarity (A, C) of the captions of one set of features with the videos of another."""
    return dmae_similarity(
        texts.sentence,
        texts.words,
        videos.frames,
        texts.word_mask,
        videos.frame_mask,
        interaction=model.interaction,
        neighbour_frames=model.neighbour_frames,
        word_logits=texts.word_logits,
        frame_logits=videos.frame_logits,
    )


def similarity_loss(block: Tensor, video_ids: Tensor, loss: LossConfig, world: World) -> LossTerms:
    """This rank's share of the similarity loss; block (B, G), video_ids (G,)."""
    row_offset, collectives = world.rank * len(block), collectives_of(world)
    if loss.similarity == "info_nce":
        return row_info_nce(
            block,
            row_offset=row_offset,
            collectives=collectives,
            video_ids=video_ids,
            mask_same_video=bool(loss.mask_same_video),
            scale=1 / loss.temperature,
        )
    return row_neg_nce(
        block,
        row_offset=row_offset,
        collectives=collectives,
        mode=loss.neg_nce_mode,
        video_ids=video_ids,
        mask_same_video=loss.mask_same_video,
        scale=1 / loss.temperature,
        weight=loss.neg_nce_weight,
    )
