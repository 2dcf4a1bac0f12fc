"""InfoNCE, NegNCE and the sigmoid loss over the similarities of a global batch: square, or rows.

A row form takes one rank's rows and returns this rank's SHARE: the shares of all ranks sum to the
value of the square form. The gradient of a share with respect to the rank's block is the gradient
of that SUM, so every rank must multiply its share by the same factor before `backward`. The square
form is the row form on a single rank.

Three options change what a negative is worth; all are off by default:

`hardness` beta > 0 weights the negatives in the denominator of every softmax by e^(beta logit),
    normalised to mean 1, without gradient; see `row_loss.info_nce` for formula and sources. With
    NegNCE the weighted P enters the penalty, too.
`drop_above` m leaves out the negatives that are probably none: in the text-to-video direction those
    with s_ij > s_ii + m, in the video-to-text direction those with s_ij > s_jj + m. They are in no
    denominator, in no hard set and get no gradient of that direction. A pair may be left out in one
    direction and count in the other.
Pairs of equal id (`mask_same_video`, `mask_equal_captions`) are left out of both directions.
"""

from jaxtyping import Float, Int
from torch import Tensor

from tvr.kernels.row_loss.loss_rule import SIGLIP_BIAS, LossRule
from tvr.kernels.row_loss.loss_terms import LossTerms
from tvr.kernels.row_loss.online_softmax import SINGLE_RANK, Collectives
from tvr.kernels.row_loss.stored_loss import row_loss

__all__ = [
    "LossTerms",
    "info_nce",
    "neg_nce",
    "row_info_nce",
    "row_loss",
    "row_neg_nce",
    "row_sigmoid_loss",
    "sigmoid_loss",
]


def info_nce(
    similarity: Float[Tensor, "G G"],
    *,
    video_ids: Int[Tensor, " G"] | None = None,
    mask_same_video: bool = False,
    caption_ids: Int[Tensor, " G"] | None = None,
    mask_equal_captions: bool = False,
    scale: float = 100.0,
    hardness: float = 0.0,
    drop_above: float | None = None,
) -> Float[Tensor, ""]:
    """Mean over both directions of -log softmax(scale x similarity) of the matched pairs.

    Args:
        similarity: Unscaled; matched pairs are on the diagonal.
        video_ids: Needed for `mask_same_video`.
        mask_same_video: Excludes pairs of a caption with another caption's copy of the same video.
        caption_ids: Needed for `mask_equal_captions`.
        mask_equal_captions: Excludes pairs of a caption with another video that has this caption.
        scale: 1 / temperature.
        hardness: Exponent of the weights of negatives; 0 weights none.
        drop_above: Leaves out the negatives that exceed their positive by more than this.
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
        hardness=hardness,
        drop_above=drop_above,
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
    hardness: float = 0.0,
    drop_above: float | None = None,
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
        hardness=hardness,
        drop_above=drop_above,
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
    hardness: float = 0.0,
    drop_above: float | None = None,
) -> LossTerms:
    """This rank's share of `info_nce`; row i of the block is row `row_offset` + i of the square."""
    rule = LossRule(
        None,
        scale=scale,
        mask_same_video=mask_same_video,
        mask_equal_captions=mask_equal_captions,
        hardness=hardness,
        drop_above=drop_above,
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
    hardness: float = 0.0,
    drop_above: float | None = None,
) -> LossTerms:
    """This rank's share of `neg_nce`; row i of the block is row `row_offset` + i of the square.

    With P the softmax of a direction and H the hard negatives (`online_softmax.hard_negatives`):

    `reference` mode: mean_i -log P_ii + weight x mean over all of H of -log(1 - P_ij), with P
        clamped to [1e-6, 1 - 1e-6]. As published, a positive below the clamp gets no gradient, and
        the penalty's part of the loss shrinks as the batch grows.
    `log` mode: mean_i (-log P_ii + weight x mean over H_i of -log(1 - P_ij)), in log space without
        a clamp. H_i are the hard negatives of text i (of video i in the other direction). Each
        hard negative still fades as more of them share the softmax.
    `set` mode: mean_i (-log P_ii - weight x log(1 - P(H_i))), where P(H_i) is the softmax mass of
        all of H_i: one penalty on the set, so its weight depends on this mass and not on the number
        of negatives that share it. With one hard negative a row it equals `log` mode.

    Args:
        block: Unscaled similarities of this rank's texts with the videos of all ranks.
        collectives: Reductions over ranks; `online_softmax.SINGLE_RANK` without other ranks.
        mode: `reference`, `log` or `set`.
        video_ids: Ids of all G pairs.
        mask_same_video: True excludes pairs of equal video id from the denominators and from H.
            None does so in `log` and `set` mode if `video_ids` are given.
        caption_ids: Ids of the captions of all G pairs, equal for equal captions.
        mask_equal_captions: The same for pairs of equal caption id.
        scale: 1 / temperature.
        weight: Weight of the penalty.
        hardness: Exponent of the weights of negatives; 0 weights none. Not in `reference` mode.
        drop_above: Leaves out the negatives that exceed their positive by more than this. Not in
            `reference` mode.

    Raises:
        ValueError: unknown mode, an option that the mode does not have, masking without ids, ids of
            another length, or rows outside the square.
    """
    rule = LossRule(
        mode,
        scale=scale,
        weight=weight,
        mask_same_video=mask_same_video,
        mask_equal_captions=mask_equal_captions,
        hardness=hardness,
        drop_above=drop_above,
    )
    return row_loss(
        block,
        rule,
        row_offset=row_offset,
        collectives=collectives,
        video_ids=video_ids,
        caption_ids=caption_ids,
    )


def sigmoid_loss(
    similarity: Float[Tensor, "G G"],
    *,
    bias: float = SIGLIP_BIAS,
    video_ids: Int[Tensor, " G"] | None = None,
    mask_same_video: bool = False,
    caption_ids: Int[Tensor, " G"] | None = None,
    mask_equal_captions: bool = False,
    scale: float = 100.0,
    drop_above: float | None = None,
) -> Float[Tensor, ""]:
    """Pairwise sigmoid loss in both directions; see `row_sigmoid_loss`."""
    return row_sigmoid_loss(
        _check_square(similarity),
        row_offset=0,
        collectives=SINGLE_RANK,
        bias=bias,
        video_ids=video_ids,
        mask_same_video=mask_same_video,
        caption_ids=caption_ids,
        mask_equal_captions=mask_equal_captions,
        scale=scale,
        drop_above=drop_above,
    ).loss


def row_sigmoid_loss(
    block: Float[Tensor, "B G"],
    *,
    row_offset: int,
    collectives: Collectives,
    bias: float = SIGLIP_BIAS,
    video_ids: Int[Tensor, " G"] | None = None,
    mask_same_video: bool = False,
    caption_ids: Int[Tensor, " G"] | None = None,
    mask_equal_captions: bool = False,
    scale: float = 100.0,
    drop_above: float | None = None,
) -> LossTerms:
    """This rank's share of the sigmoid loss; row i of the block is row `row_offset` + i.

    With x = scale x similarity + bias: mean_i (-log sigma(x_ii) - sum over j != i of
    log sigma(-x_ij)), over rows and over columns. This is SigLIP's loss (arXiv 2303.15343), where
    scale and bias are learned from 10 and -10; here both are constants.

    Args:
        bias: A pair of similarity -bias / scale has probability one half: 0.1 with the defaults.

    Raises:
        ValueError: as `row_neg_nce`.
    """
    rule = LossRule(
        None,
        scale=scale,
        mask_same_video=mask_same_video,
        mask_equal_captions=mask_equal_captions,
        drop_above=drop_above,
        sigmoid=True,
        sigmoid_bias=bias,
    )
    return row_loss(
        block,
        rule,
        row_offset=row_offset,
        collectives=collectives,
        video_ids=video_ids,
        caption_ids=caption_ids,
    )


def _check_square(similarity: Tensor) -> Tensor:
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(
            f"similarity has shape {tuple(similarity.shape)} but must be square with matched "
            "pairs on the diagonal; use the row forms for one rank's rows"
        )
    return similarity
