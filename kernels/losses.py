"""InfoNCE and NegNCE over the similarity of a global batch, whole or one rank's rows of it.

Every row form returns this rank's SHARE: the shares of all ranks sum to the value of the square
form, and the gradients of that sum with respect to the blocks are the rows of the square form's
gradient. The square form is the row form of a single rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvr.kernels.rows import ALONE, Collectives, Rows, make_rows

SMALLEST = 1e-6  # the reference's clamp of a probability, and of 1 minus it
DOMINANT = 0.75  # at most one entry of a softmax exceeds this, whatever the rounding


@dataclass(frozen=True)
class LossTerms:
    """One rank's share of a loss: each field's sum over ranks is the global batch's value.

    `loss` is the mean of the two directions. Without gradient: `hard_per_row`, the mean number of
    hard negatives of a text, and `clamped_share`, the share of positives (of both directions)
    whose probability lies under the reference's clamp, so that they get no gradient.
    """

    loss: Float[Tensor, ""]
    text_to_video: Float[Tensor, ""]
    video_to_text: Float[Tensor, ""]
    hard_per_row: Float[Tensor, ""]
    clamped_share: Float[Tensor, ""]


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
    rows = make_rows(
        block,
        row_offset=row_offset,
        collectives=collectives,
        video_ids=video_ids,
        mask_same_video=mask_same_video,
        scale=scale,
    )
    positives = [rows.of_positives(lse(rows.logits) - rows.logits) for lse in rows.directions]
    return _terms(rows, [x.sum() / rows.num_pairs for x in positives])


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
    if mode not in ("reference", "log"):
        raise ValueError(f"mode={mode!r} of NegNCE is unknown; use 'reference' or 'log'")
    if mask_same_video is None:
        mask_same_video = mode == "log" and video_ids is not None
    rows = make_rows(
        block,
        row_offset=row_offset,
        collectives=collectives,
        video_ids=video_ids,
        mask_same_video=mask_same_video,
        scale=scale,
    )
    return (_log_terms if mode == "log" else _reference_terms)(rows, weight)


def _reference_terms(rows: Rows, weight: float) -> LossTerms:
    hard_pairs = rows.collectives.sum(rows.hard.sum().to(rows.logits.dtype)).clamp_min(1)
    shares, clamped = [], []
    for logsumexp in rows.directions:
        probability = (rows.logits - logsumexp(rows.logits)).exp()
        clamped.append((rows.of_positives(probability.detach()) < SMALLEST).sum())
        probability = probability.clamp(SMALLEST, 1 - SMALLEST)
        positive = -rows.of_positives(probability).log().sum() / rows.num_pairs
        negative = -torch.log1p(-probability.masked_fill(~rows.hard, 0)).sum() / hard_pairs
        shares.append(positive + weight * negative)
    return _terms(rows, shares, clamped=clamped[0] + clamped[1])


def _log_terms(rows: Rows, weight: float) -> LossTerms:
    of_text = rows.hard.sum(dim=1, keepdim=True).to(rows.logits.dtype)
    of_video = rows.collectives.sum(rows.hard.sum(dim=0, keepdim=True).to(rows.logits.dtype))
    shares = []
    for logsumexp, count in zip(rows.directions, (of_text, of_video), strict=True):
        total = logsumexp(rows.logits)
        positive = rows.of_positives(total - rows.logits).sum()
        negative = (_minus_log_rest(rows, logsumexp, total) / count.clamp_min(1)).sum()
        shares.append((positive + weight * negative) / rows.num_pairs)
    return _terms(rows, shares)


def _minus_log_rest(
    rows: Rows, logsumexp: Callable[[Tensor], Tensor], total: Tensor
) -> Float[Tensor, "B G"]:
    """-log(1 - P) of the hard negatives, 0 elsewhere, exact and with a gradient even at P = 1.

    log1p(-P) serves while P is moderate. Near 1 it would be log 0, so there 1 - P is the sum of
    the OTHER entries over the total: their log-sum-exp has its own maximum and cannot underflow.
    A dominant hard negative is off the diagonal, so the others hold at least the positive.
    """
    probability = (rows.logits - total).exp()
    dominant = rows.hard & (probability.detach() > DOMINANT)
    others = logsumexp(rows.logits.masked_fill(dominant, -torch.inf))
    moderate = -torch.log1p(-probability.masked_fill(dominant | ~rows.hard, 0))
    return torch.where(dominant, total - others, moderate)


def _terms(rows: Rows, shares: list[Tensor], clamped: Tensor | None = None) -> LossTerms:
    text_to_video, video_to_text = shares
    dtype = rows.logits.dtype
    none = rows.logits.new_zeros(())
    return LossTerms(
        loss=(text_to_video + video_to_text) / 2,
        text_to_video=text_to_video,
        video_to_text=video_to_text,
        hard_per_row=rows.hard.sum().to(dtype) / rows.num_pairs,
        clamped_share=none if clamped is None else clamped.to(dtype) / (2 * rows.num_pairs),
    )


def _square(similarity: Tensor) -> Tensor:
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(
            f"similarity has shape {tuple(similarity.shape)} but must be square with matched "
            "pairs on the diagonal; use the row forms for one rank's rows"
        )
    return similarity
