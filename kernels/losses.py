"""InfoNCE and NegNCE over the similarities of a global batch: the square, or one rank's rows.

A row form returns this rank's SHARE: the shares of all ranks sum to the value of the square form.
The gradient of a share with respect to the rank's block is the gradient of that SUM, so every rank
must multiply its share by the same factor before `backward`. The square form is the row form on a
single rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tvr.kernels.numerics import at_least_float32
from tvr.kernels.row_loss.loss_terms import LossTerms, loss_terms
from tvr.kernels.row_loss.online_softmax import SINGLE_RANK, Collectives, TilePosition
from tvr.kernels.row_loss.row_loss import LossRule, RowLoss

__all__ = ["LossTerms", "info_nce", "neg_nce", "row_info_nce", "row_loss", "row_neg_nce"]

# Rows are processed in chunks of this many scores (4 MiB in float32), so that the temporaries fit
# the cache of a CPU. On a GPU chunks are 16 times larger, because a kernel launch costs more.
SCORES_PER_CHUNK = 2**20


def info_nce(
    similarity: Float[Tensor, "G G"],
    *,
    video_ids: Int[Tensor, " G"] | None = None,
    mask_same_video: bool = False,
    caption_ids: Int[Tensor, " G"] | None = None,
    mask_equal_captions: bool = False,
    scale: float = 100.0,
) -> Float[Tensor, ""]:
    """Mean over both directions of -log softmax(scale x similarity) of the matched pairs.

    Args:
        similarity: Unscaled; matched pairs are on the diagonal.
        video_ids: Needed for `mask_same_video`.
        mask_same_video: Excludes pairs of a caption with another caption's copy of the same video.
        caption_ids: Needed for `mask_equal_captions`.
        mask_equal_captions: Excludes pairs of a caption with another video that has this caption.
        scale: 1 / temperature.
    """
    return row_info_nce(
        _check_square(similarity),
        row_offset=0,
        collectives=SINGLE_RANK,
        video_ids=video_ids,
        mask_same_video=mask_same_video,
        caption_ids=caption_ids,
        mask_equal_captions=mask_equal_captions,
        scale=scale,
    ).loss


def neg_nce(
    similarity: Float[Tensor, "G G"],
    *,
    mode: str = "reference",
    video_ids: Int[Tensor, " G"] | None = None,
    mask_same_video: bool | None = None,
    caption_ids: Int[Tensor, " G"] | None = None,
    mask_equal_captions: bool | None = None,
    scale: float = 100.0,
    weight: float = 0.5,
) -> Float[Tensor, ""]:
    """InfoNCE plus a penalty on hard negatives (method section 3); see `row_neg_nce`."""
    return row_neg_nce(
        _check_square(similarity),
        row_offset=0,
        collectives=SINGLE_RANK,
        mode=mode,
        video_ids=video_ids,
        mask_same_video=mask_same_video,
        caption_ids=caption_ids,
        mask_equal_captions=mask_equal_captions,
        scale=scale,
        weight=weight,
    ).loss


def row_info_nce(
    block: Float[Tensor, "B G"],
    *,
    row_offset: int,
    collectives: Collectives,
    video_ids: Int[Tensor, " G"] | None = None,
    mask_same_video: bool = False,
    caption_ids: Int[Tensor, " G"] | None = None,
    mask_equal_captions: bool = False,
    scale: float = 100.0,
) -> LossTerms:
    """This rank's share of `info_nce`; row i of the block is row `row_offset` + i of the square."""
    rule = LossRule(
        None,
        scale=scale,
        mask_same_video=mask_same_video,
        mask_equal_captions=mask_equal_captions,
    )
    return row_loss(
        block,
        rule,
        row_offset=row_offset,
        collectives=collectives,
        video_ids=video_ids,
        caption_ids=caption_ids,
    )


def row_neg_nce(
    block: Float[Tensor, "B G"],
    *,
    row_offset: int,
    collectives: Collectives,
    mode: str = "reference",
    video_ids: Int[Tensor, " G"] | None = None,
    mask_same_video: bool | None = None,
    caption_ids: Int[Tensor, " G"] | None = None,
    mask_equal_captions: bool | None = None,
    scale: float = 100.0,
    weight: float = 0.5,
) -> LossTerms:
    """This rank's share of `neg_nce`; row i of the block is row `row_offset` + i of the square.

    With P the softmax of a direction and H the hard negatives (`online_softmax.hard_negatives`):

    `reference` mode: mean_i -log P_ii + weight x mean over all of H of -log(1 - P_ij), with P
        clamped to [1e-6, 1 - 1e-6]. As published, a positive below the clamp gets no gradient, and
        the penalty's part of the loss shrinks as the batch grows.
    `log` mode: mean_i (-log P_ii + weight x mean over H_i of -log(1 - P_ij)), in log space without
        a clamp. H_i are the hard negatives of text i (of video i in the other direction).

    Args:
        block: Unscaled similarities of this rank's texts with the videos of all ranks.
        collectives: Reductions over ranks; `online_softmax.SINGLE_RANK` without other ranks.
        mode: `reference` or `log`.
        video_ids: Ids of all G pairs.
        mask_same_video: True excludes pairs of equal video id from the denominators and from H.
            None does so in `log` mode if `video_ids` are given.
        caption_ids: Ids of the captions of all G pairs, equal for equal captions.
        mask_equal_captions: The same for pairs of equal caption id.
        scale: 1 / temperature.
        weight: Weight of the penalty.

    Raises:
        ValueError: unknown mode, masking without ids, ids of another length, or rows outside the
            square.
    """
    rule = LossRule(
        mode,
        scale=scale,
        weight=weight,
        mask_same_video=mask_same_video,
        mask_equal_captions=mask_equal_captions,
    )
    return row_loss(
        block,
        rule,
        row_offset=row_offset,
        collectives=collectives,
        video_ids=video_ids,
        caption_ids=caption_ids,
    )


def row_loss(
    block: Float[Tensor, "B G"],
    rule: LossRule,
    *,
    row_offset: int,
    collectives: Collectives,
    video_ids: Int[Tensor, " G"] | None = None,
    caption_ids: Int[Tensor, " G"] | None = None,
) -> LossTerms:
    """`row_info_nce` or `row_neg_nce`, selected by the rule.

    Beside the block and its gradient, memory is O(B + G) and a fixed scratch.
    """
    loss = RowLoss(
        rule,
        num_rows=block.shape[0],
        num_pairs=block.shape[1],
        row_offset=row_offset,
        collectives=collectives,
        video_ids=video_ids,
        caption_ids=caption_ids,
        like=at_least_float32(block[:0]).detach(),
    )
    return loss_terms(loss, _BlockLoss.apply(block, loss))


class _BlockLoss(torch.autograd.Function):
    """Shares of the two directions, from a block of scores that stays in memory."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, loss: RowLoss) -> tuple[Tensor, Tensor]:
        if loss.needs_positives:
            for position, rows in _row_chunks(block, loss.row_offset):
                loss.add_positives(rows, position)
            loss.finish_positives()
        for position, rows in _row_chunks(block, loss.row_offset):
            loss.add_softmax_stats(at_least_float32(rows), position)
        loss.finish_softmax()
        for position, rows in _row_chunks(block, loss.row_offset):
            loss.add_hard_negatives(at_least_float32(rows), position)
        loss.finish_hard_negatives()
        ctx.save_for_backward(block)
        ctx.loss = loss
        return loss.shares()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's "ctx, /")
        ctx: Any, *factors: Tensor
    ) -> tuple[Tensor, None]:
        (block,) = ctx.saved_tensors
        result = torch.empty_like(block)
        for position, rows in _row_chunks(block, ctx.loss.row_offset):
            gradient = ctx.loss.gradient(at_least_float32(rows), position, *factors)
            result[position.row : position.row + len(rows)] = gradient
        return result, None


def _row_chunks(block: Tensor, row_offset: int) -> Iterator[tuple[TilePosition, Tensor]]:
    scores = SCORES_PER_CHUNK if block.device.type == "cpu" else 16 * SCORES_PER_CHUNK
    size = max(1, scores // max(1, block.shape[1]))
    for row, rows in zip(range(0, len(block), size), block.split(size), strict=True):
        yield TilePosition(row, 0, row_offset), rows


def _check_square(similarity: Tensor) -> Tensor:
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(
            f"similarity has shape {tuple(similarity.shape)} but must be square with matched "
            "pairs on the diagonal; use the row forms for one rank's rows"
        )
    return similarity
