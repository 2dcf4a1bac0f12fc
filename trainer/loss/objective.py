"""The loss of the global batch from one rank's features: its texts against everyone's frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tvr.kernels.losses import LossTerms, row_loss
from tvr.kernels.row_loss.row_loss import LossRule
from tvr.kernels.row_loss.streamed_loss import streamed_loss
from tvr.kernels.similarity import dmae_similarity
from tvr.trainer.config import LossConfig, ModelConfig
from tvr.trainer.distributed.collectives import all_gather_rows, loss_collectives
from tvr.trainer.distributed.exchange import AllGatherExchange, RingExchange
from tvr.trainer.distributed.world import World
from tvr.trainer.model.model import Features
from tvr.trainer.monitoring.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class Objective:
    """One rank's part of a step's loss.

    `for_backward` carries the gradient, already scaled for an engine that averages over ranks.
    `shares` are without gradient, in the order of SHARES; their sums over ranks are the values of
    the global batch.
    """

    for_backward: Tensor
    shares: Tensor


SHARES = (
    "loss",
    "similarity_loss",
    "tpm_cl_loss",
    "penalty",
    "hard_negatives_per_row",
    "clamped_share",
    "positive_similarity",
    "hardest_similarity",
)


def objective(
    mine: Features,
    video_ids: Tensor,
    model: ModelConfig,
    loss: LossConfig,
    world: World,
    *,
    exchange: Literal["gather", "ring"] = "gather",
    scores: Literal["keep", "stream"] = "keep",
    fast: bool = False,
    watch: Stopwatch | None = None,
) -> Objective:
    """Similarity loss plus TPM-CL over the global batch (the method, sections 3 and 4).

    `mine` are the features of this rank's B pairs, `video_ids` (B,) theirs; B may differ between
    ranks. Only the frames, the shorter side, travel; the (B, G) similarities are this rank's alone.
    `exchange` and `scores` (see `TrainConfig`) change what is in memory, and nothing else; `fast`
    is `TrainConfig.fast_similarity`. Streamed or in a ring, gather and loss are parts of the
    similarity for the `watch` too.
    """
    watch = watch or Stopwatch()
    counts = world.all_gather_counts(len(video_ids))
    everyones_ids = all_gather_rows(video_ids, world, counts)
    if exchange == "gather" and scores == "keep":
        videos = gathered_videos(mine, world, counts)
        watch.lap("gather")
        block = similarity_rows(mine, videos, model, fast=fast)
        watch.lap("similarity")
        terms = row_loss(
            block,
            loss_rule(loss),
            row_offset=sum(counts[: world.rank]),
            collectives=loss_collectives(world),
            video_ids=everyones_ids,
        )
    else:
        terms = streamed_loss(
            mine.sentence,
            mine.words,
            mine.frames,
            mine.word_mask,
            mine.frame_mask,
            interaction=model.interaction,
            neighbour_frames=model.neighbour_frames,
            word_logits=mine.word_logits,
            frame_logits=mine.frame_logits,
            rule=loss_rule(loss),
            row_offset=sum(counts[: world.rank]),
            num_pairs=sum(counts),
            collectives=loss_collectives(world),
            exchange=(RingExchange if exchange == "ring" else AllGatherExchange)(world, counts),
            video_ids=everyones_ids,
            keep_scores=scores == "keep",
            fast=fast,
        )
        watch.lap("similarity")
    return _with_tpm_cl(terms, mine.margin_hinge, loss.tpm_cl_weight, world, sum(counts))


def _with_tpm_cl(
    terms: LossTerms, hinge: Tensor | None, weight: float, world: World, num_pairs: int
) -> Objective:
    """Adds the hinges (B,) of this rank's pairs, whose mean is over the global batch."""
    margin = terms.loss.new_zeros(()) if hinge is None else hinge.sum() / num_pairs
    share = terms.loss + weight * margin
    shares = [share, terms.loss, margin, terms.penalty, terms.hard_negatives_per_row]
    shares += [terms.clamped_share, terms.positive_similarity, terms.hardest_similarity]
    return Objective(
        for_backward=share * world.world_size,  # the scale rule: see gather.py
        shares=torch.stack([x.detach() for x in shares]),
    )


def loss_rule(loss: LossConfig) -> LossRule:
    """The settings of the similarity loss as the kernels take them."""
    contrastive = loss.similarity == "info_nce"
    return LossRule(
        None if contrastive else loss.neg_nce_mode,
        scale=1 / loss.temperature,
        weight=loss.neg_nce_weight,
        mask_same_video=loss.mask_same_video,
    )


def gathered_videos(mine: Features, world: World, counts: Sequence[int]) -> Features:
    """`mine` with the frames, frame masks and frame logits of all ranks, in rank order."""
    logits = mine.frame_logits
    return mine._replace(
        frames=all_gather_rows(mine.frames, world, counts),
        frame_mask=all_gather_rows(mine.frame_mask, world, counts),
        frame_logits=None if logits is None else all_gather_rows(logits, world, counts),
    )


def similarity_rows(
    texts: Features, videos: Features, model: ModelConfig, *, fast: bool = False
) -> Tensor:
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
        fast=fast,
    )
