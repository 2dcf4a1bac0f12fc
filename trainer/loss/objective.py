"""The loss of the global batch, of which each rank computes the rows of its own texts."""

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
from tvr.kernels.text_lengths import TextLengths
from tvr.trainer.config import LossConfig, ModelConfig, masks_equal_captions
from tvr.trainer.distributed.collectives import all_gather_rows, loss_collectives
from tvr.trainer.distributed.exchange import AllGatherExchange, RingExchange
from tvr.trainer.distributed.world import World
from tvr.trainer.model.model import Features
from tvr.trainer.monitoring.step_record import LOSS_TERMS
from tvr.trainer.monitoring.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class Objective:
    """One rank's share of a step's loss."""

    for_backward: Tensor
    """The share with its gradient, scaled for an engine that averages gradients over ranks."""
    shares: Tensor
    """(LOSS_TERMS,) this rank's shares of the terms, without gradient: their sums over the ranks
    are the values of the global batch."""


def objective(
    mine: Features,
    video_ids: Tensor,
    model: ModelConfig,
    loss: LossConfig,
    world: World,
    *,
    caption_ids: Tensor | None = None,
    exchange: Literal["gather", "ring"] = "gather",
    scores: Literal["keep", "stream"] = "keep",
    fast: bool = False,
    backend: str = "auto",
    compile_tiles: bool = False,
    counts: Sequence[int] | None = None,
    lengths: TextLengths | None = None,
    watch: Stopwatch | None = None,
) -> Objective:
    """Similarity loss plus TPM-CL over the global batch (the method, sections 3 and 4).

    Each rank computes the (B, G) similarities of its own texts with the videos of all ranks. Only
    the frames, the shorter side, are exchanged between ranks.

    Args:
        mine: Features of this rank's B pairs; B may differ between ranks.
        video_ids: (B,) ids of their videos.
        caption_ids: (B,) ids of their captions; None = pairs are compared by their video only.
        exchange: "gather" holds the frames of all ranks at once, "ring" those of one other rank.
        scores: "keep" holds the (B, G) scores for the backward, "stream" computes them again.
        fast: Rounds words and frames to bfloat16; see `TrainConfig.fast_similarity`.
        backend: As `TrainConfig.similarity_backend`.
        compile_tiles: As `TrainConfig.compile_similarity`.
        counts: Number of pairs of each rank; None asks all ranks.
        lengths: Of the texts, from `host_lengths`; None reads the masks from the device.
        watch: Measures "gather", "similarity" and "loss". With "ring" or "stream" the three are one
            part, "similarity".
    """
    watch = watch or Stopwatch()
    counts = world.all_gather_counts(len(video_ids)) if counts is None else counts
    if not masks_equal_captions(loss):
        caption_ids = None
    video_ids, caption_ids = _ids_of_all_ranks(video_ids, caption_ids, world, counts)
    if exchange == "gather" and scores == "keep":
        videos = all_gather_videos(mine, world, counts)
        watch.lap("gather")
        block = similarity_rows(
            mine,
            videos,
            model,
            fast=fast,
            lengths=lengths,
            backend=backend,
            compile_tiles=compile_tiles,
        )
        watch.lap("similarity")
        terms = row_loss(
            block,
            loss_rule(loss),
            row_offset=sum(counts[: world.rank]),
            collectives=loss_collectives(world),
            video_ids=video_ids,
            caption_ids=caption_ids,
        )
    else:
        terms = streamed_loss(
            mine.sentence,
            mine.words,
            mine.frames,
            mine.word_mask,
            mine.frame_mask,
            interaction=model.interaction,
            matching=model.matching,
            neighbour_frames=model.neighbour_frames,
            word_logits=mine.word_logits,
            frame_logits=mine.frame_logits,
            rule=loss_rule(loss),
            row_offset=sum(counts[: world.rank]),
            num_pairs=sum(counts),
            collectives=loss_collectives(world),
            exchange=(RingExchange if exchange == "ring" else AllGatherExchange)(world, counts),
            video_ids=video_ids,
            caption_ids=caption_ids,
            keep_scores=scores == "keep",
            backend=None if backend == "auto" else backend,
            fast=fast,
            compile_tiles=compile_tiles,
            lengths=lengths,
        )
        watch.lap("similarity")
    return _with_tpm_cl(terms, mine.margin_hinge, loss.tpm_cl_weight, world, sum(counts))


def _with_tpm_cl(
    terms: LossTerms, hinge: Tensor | None, weight: float, world: World, num_pairs: int
) -> Objective:
    """Adds TPM-CL: the mean over the global batch of the hinges (B,) of matched pairs."""
    margin = terms.loss.new_zeros(()) if hinge is None else hinge.sum() / num_pairs
    share = terms.loss + weight * margin
    sums = {"loss": share, "similarity_loss": terms.loss, "tpm_cl_loss": margin}
    # A step's record names the other terms as LossTerms does.
    shares = [sums[name] if name in sums else getattr(terms, name) for name in LOSS_TERMS]
    return Objective(
        for_backward=share * world.world_size,  # the scale rule: see collectives.py
        shares=torch.stack([x.detach() for x in shares]),
    )


def loss_rule(loss: LossConfig) -> LossRule:
    """The similarity loss of these settings, in the form that the kernels take."""
    return LossRule(
        loss.neg_nce_mode if loss.similarity == "neg_nce" else None,
        scale=1 / loss.temperature,
        weight=loss.neg_nce_weight,
        mask_same_video=loss.mask_same_video,
        mask_equal_captions=loss.mask_equal_captions,
        hardness=loss.hardness,
        drop_above=loss.drop_above,
        sigmoid=loss.similarity == "sigmoid",
        sigmoid_bias=loss.sigmoid_bias,
    )


def _ids_of_all_ranks(
    video_ids: Tensor, caption_ids: Tensor | None, world: World, counts: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Gathers the ids of all pairs, in one collective."""
    if caption_ids is None:
        return all_gather_rows(video_ids, world, counts), None
    both = all_gather_rows(torch.stack([video_ids, caption_ids], dim=1), world, counts)
    of_videos, of_captions = both.unbind(1)
    return of_videos.contiguous(), of_captions.contiguous()


def all_gather_videos(mine: Features, world: World, counts: Sequence[int]) -> Features:
    """`mine` with the frames, frame masks and frame logits of all ranks, in rank order."""
    logits = mine.frame_logits
    return mine._replace(
        frames=all_gather_rows(mine.frames, world, counts),
        frame_mask=all_gather_rows(mine.frame_mask, world, counts),
        frame_logits=None if logits is None else all_gather_rows(logits, world, counts),
    )


def similarity_rows(
    texts: Features,
    videos: Features,
    model: ModelConfig,
    *,
    fast: bool = False,
    backend: str = "auto",
    compile_tiles: bool = False,
    lengths: TextLengths | None = None,
) -> Tensor:
    """Similarity (A, C) of the captions of `texts` with the videos of `videos`."""
    return dmae_similarity(
        texts.sentence,
        texts.words,
        videos.frames,
        texts.word_mask,
        videos.frame_mask,
        interaction=model.interaction,
        matching=model.matching,
        neighbour_frames=model.neighbour_frames,
        word_logits=texts.word_logits,
        frame_logits=videos.frame_logits,
        backend=None if backend == "auto" else backend,
        fast=fast,
        compile_tiles=compile_tiles,
        lengths=lengths,
    )
