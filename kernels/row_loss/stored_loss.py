"""The loss of a block of scores that stays in memory."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tvr.kernels.numerics import at_least_float32
from tvr.kernels.row_loss.loss_terms import LossTerms, loss_terms
from tvr.kernels.row_loss.online_softmax import Collectives, TilePosition
from tvr.kernels.row_loss.row_loss import LossRule, RowLoss

# Rows are processed in chunks of this many scores (4 MiB in float32), so that the temporaries fit
# the cache of a CPU. On a GPU chunks are 16 times larger, because a kernel launch costs more.
SCORES_PER_CHUNK = 2**20


def row_loss(
    block: Float[Tensor, "B G"],
    rule: LossRule,
    *,
    row_offset: int,
    collectives: Collectives,
    video_ids: Int[Tensor, " G"] | None = None,
    caption_ids: Int[Tensor, " G"] | None = None,
) -> LossTerms:
    """This rank's share of the loss that the rule selects; see `losses`.

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
    for row in range(0, len(block), size):  # none on a rank without rows
        yield TilePosition(row, 0, row_offset), block[row : row + size]
