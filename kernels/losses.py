"""InfoNCE and NegNCE over the similarity of a global batch, whole or one rank's rows of it.

Every row form returns this rank's SHARE: the shares of all ranks sum to the value of the square
form. The gradient of a share with respect to the rank's block is that of the SUM, the rows of the
square form's gradient, so every rank must weigh its share by the same factor before `backward`.
The square form is the row form of a single rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tvr.kernels.reference import raised
from tvr.kernels.row_loss.online_softmax import ALONE, Collectives, Place
from tvr.kernels.row_loss.row_loss import LossRule, RowLoss

# Rows are taken so many scores at a time (4 MiB in float32): what the formulas need beside the
# block itself stays in a CPU's cache. On a GPU, where starting an operation costs more, 16 times.
SCORES_AT_ONCE = 2**20


@dataclass(frozen=True)
class LossTerms:
    """One rank's share of a loss: each field's sum over ranks is the global batch's value.

    `loss` is the mean of the two directions. Without gradient: `penalty`, the part of `loss` that
    NegNCE adds for hard negatives; `hard_per_row`, the mean number of hard negatives of a text;
    `clamped_share`, the share of positives (of both directions) whose probability lies under the
    reference's clamp, so that they get no gradient; `positive_similarity` and `hardest_similarity`,
    the means over texts of the similarity with their own video and with the nearest of the others.
    """

    loss: Float[Tensor, ""]
    text_to_video: Float[Tensor, ""]
    video_to_text: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    hard_per_row: Float[Tensor, ""]
    clamped_share: Float[Tensor, ""]
    positive_similarity: Float[Tensor, ""]
    hardest_similarity: Float[Tensor, ""]


def info_nce(
    similarity: Float[Tensor, "G G"],
    *,
    video_ids: Int[Tensor, " G"] | None = None,
    mask_same_video: bool = False,
    scale: float = 100.0,
) -> Float[Tensor, ""]:
    """Mean over both directions of -log softmax(scale x similarity) of the matched pairs.

    With `mask_same_video`, pairs of different captions and equal video id are no negatives.
    """
    return row_info_nce(
        _square(similarity),
        row_offset=0,
        collectives=ALONE,
        video_ids=video_ids,
        mask_same_video=mask_same_video,
        scale=scale,
    ).loss


def neg_nce(
    similarity: Float[Tensor, "G G"],
    *,
    mode: str = "reference",
    video_ids: Int[Tensor, " G"] | None = None,
    mask_same_video: bool | None = None,
    scale: float = 100.0,
    weight: float = 0.5,
) -> Float[Tensor, ""]:
    """InfoNCE plus `weight` x a penalty on hard negatives (method section 3): `row_neg_nce`."""
    return row_neg_nce(
        _square(similarity),
        row_offset=0,
        collectives=ALONE,
        mode=mode,
        video_ids=video_ids,
        mask_same_video=mask_same_video,
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
    scale: float = 100.0,
) -> LossTerms:
    """This rank's share of `info_nce`; row i of the block is row `row_offset` + i of the square."""
    rule = LossRule(None, scale=scale, mask_same_video=mask_same_video)
    return row_loss(
        block, rule, row_offset=row_offset, collectives=collectives, video_ids=video_ids
    )


def row_neg_nce(
    block: Float[Tensor, "B G"],
    *,
    row_offset: int,
    collectives: Collectives,
    mode: str = "reference",
    video_ids: Int[Tensor, " G"] | None = None,
    mask_same_video: bool | None = None,
    scale: float = 100.0,
    weight: float = 0.5,
) -> LossTerms:
    """This rank's share of `neg_nce`; row i of the block is row `row_offset` + i of the square.

    With P the softmax of a direction and H the hard negatives (`rows.hard_negatives`),
    `reference`: mean_i -log P_ii + weight x mean over all of H of -log(1 - P_ij), P clamped to
        [1e-6, 1 - 1e-6]. As published: a positive under the clamp gets no gradient, and the
        penalty's share of the loss falls as the batch grows.
    `log`: mean_i (-log P_ii + weight x mean over H_i of -log(1 - P_ij)), in log space, unclamped,
        H_i being the hard negatives of text i (of video i in the other direction).

    `mask_same_video` removes pairs of equal video id from the denominators and from H; None turns
    it on in `log` mode where `video_ids` are given.

    Raises:
        ValueError: unknown mode, a mask without ids, ids of another length, or rows outside the
            square.
    """
    rule = LossRule(mode, scale=scale, weight=weight, mask_same_video=mask_same_video)
    return row_loss(
        block, rule, row_offset=row_offset, collectives=collectives, video_ids=video_ids
    )


def row_loss(
    block: Float[Tensor, "B G"],
    rule: LossRule,
    *,
    row_offset: int,
    collectives: Collectives,
    video_ids: Int[Tensor, " G"] | None = None,
) -> LossTerms:
    """`row_info_nce` or `row_neg_nce`, as the rule says.

    Beside the block and its gradient, memory is O(B + G) and a fixed scratch.
    """
    loss = RowLoss(
        rule,
        num_rows=block.shape[0],
        num_pairs=block.shape[1],
        row_offset=row_offset,
        collectives=collectives,
        video_ids=video_ids,
        like=raised(block[:0]).detach(),
    )
    return terms_of(loss, _BlockLoss.apply(block, loss))


def terms_of(loss: RowLoss, shares: tuple[Tensor, Tensor]) -> LossTerms:
    """The terms after both passes; `shares` are the two directions, with their gradient."""
    text_to_video, video_to_text = shares
    return LossTerms(
        (text_to_video + video_to_text) / 2, text_to_video, video_to_text, *loss.statistics()
    )


class _BlockLoss(torch.autograd.Function):
    """The two directions' shares of a block whose scores are kept."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, loss: RowLoss) -> tuple[Tensor, Tensor]:
        for place, rows in _by_rows(block, loss.row_offset):
            loss.look(raised(rows), place)
        loss.looked()
        for place, rows in _by_rows(block, loss.row_offset):
            loss.meet(raised(rows), place)
        loss.met()
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
        for place, rows in _by_rows(block, ctx.loss.row_offset):
            gradient = ctx.loss.gradient(raised(rows), place, *factors)
            result[place.row : place.row + len(rows)] = gradient
        return result, None


def _by_rows(block: Tensor, row_offset: int) -> Iterator[tuple[Place, Tensor]]:
    at_once = SCORES_AT_ONCE if block.device.type == "cpu" else 16 * SCORES_AT_ONCE
    size = max(1, at_once // max(1, block.shape[1]))
    for row, rows in zip(range(0, len(block), size), block.split(size), strict=True):
        yield Place(row, 0, row_offset), rows


def _square(similarity: Tensor) -> Tensor:
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(
            f"similarity has shape {tuple(similarity.shape)} but must be square with matched "
            "pairs on the diagonal; use the row forms for one rank's rows"
        )
    return similarity
