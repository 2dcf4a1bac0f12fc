"""InfoNCE and NegNCE beyond the golden arrays: ranks, log mode, masks, extreme scores, errors."""

from typing import Any

import pytest
import torch
from builders.ranks_in_threads import ThreadCollectives, on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tvr.kernels.losses import LossTerms, info_nce, neg_nce, row_info_nce, row_neg_nce
from tvr.kernels.row_loss.online_softmax import SINGLE_RANK
from tvr.kernels.row_loss.row_loss import LossRule

KINDS = ("info", "reference", "log", "set")
EXAMPLES = settings(max_examples=15, deadline=None, derandomize=True)


def scores(num_pairs: int, seed: int, spread: float = 0.3, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_pairs, num_pairs, generator=generator, dtype=torch.float64)
    return (spread * noise + 0.05 * torch.eye(num_pairs)).to(dtype)


def square(kind: str, similarity: Tensor, **options) -> Tensor:
    if kind == "info":
        return info_nce(similarity, **options)
    return neg_nce(similarity, mode=kind, **options)


def rows(kind: str, block: Tensor, offset: int, collectives, **options) -> LossTerms:
    options |= {"row_offset": offset, "collectives": collectives}
    if kind == "info":
        return row_info_nce(block, **options)
    return row_neg_nce(block, mode=kind, **options)


def naive_log_neg_nce(similarity: Tensor, excluded: Tensor, weight: float = 0.5) -> Tensor:
    """One direction of the log mode in loops, for moderate probabilities."""
    num_pairs = len(similarity)
    total = similarity.new_zeros(())
    for i in range(num_pairs):
        kept = [j for j in range(num_pairs) if not excluded[i, j]]
        p = (100 * similarity[i, kept]).softmax(0)
        total = total - p[kept.index(i)].log()
        above = [
            -torch.log(1 - p[k])
            for k, j in enumerate(kept)
            if j != i
            and (similarity[i, j] > similarity[i, i] or similarity[i, j] > similarity[j, j])
        ]
        if above:
            total = total + weight * torch.stack(above).mean()
    return total / num_pairs


def naive_set_neg_nce(similarity: Tensor, excluded: Tensor) -> Tensor:
    """One direction of the `set` mode."""
    p = (100 * similarity).masked_fill(excluded, -torch.inf).softmax(1)
    positive = similarity.diagonal()
    hard = ((similarity > positive[:, None]) | (similarity > positive)) & ~excluded
    of_set = (p * hard.fill_diagonal_(False)).sum(1)
    return (-p.diagonal().log() - 0.5 * (1 - of_set).log()).mean()


def naive_info_nce(similarity: Tensor, excluded: Tensor) -> Tensor:
    """One direction of InfoNCE."""
    logits = (100 * similarity).masked_fill(excluded, -torch.inf)
    return -logits.log_softmax(1).diagonal().mean()


def naive_reference_neg_nce(similarity: Tensor, excluded: Tensor) -> Tensor:
    """One direction of the `reference` mode."""
    logits = (100 * similarity).masked_fill(excluded, -torch.inf)
    p = logits.softmax(1).clamp(1e-6, 1 - 1e-6)
    positive = similarity.diagonal()
    hard = ((similarity > positive[:, None]) | (similarity > positive)) & ~excluded
    return -p.diagonal().log().mean() + 0.5 * -(1 - p[hard.fill_diagonal_(False)]).log().mean()


NAIVE = {
    "info": naive_info_nce,
    "reference": naive_reference_neg_nce,
    "log": naive_log_neg_nce,
    "set": naive_set_neg_nce,
}
VIDEOS, CAPTIONS = torch.tensor([0, 1, 1, 2, 0, 3, 0]), torch.tensor([5, 6, 7, 5, 8, 8, 5])


@pytest.mark.parametrize("equal_captions", [False, True])
@pytest.mark.parametrize("same_video", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_their_naive_formula(
    kind: str, same_video: bool, equal_captions: bool
) -> None:
    similarity = scores(7, 0, spread=0.02).requires_grad_()
    excluded = (VIDEOS[:, None] == VIDEOS) & same_video
    excluded |= (CAPTIONS[:, None] == CAPTIONS) & equal_captions
    excluded.fill_diagonal_(False)
    expected = (NAIVE[kind](similarity, excluded) + NAIVE[kind](similarity.T, excluded)) / 2
    actual = square(
        kind,
        similarity,
        video_ids=VIDEOS,
        mask_same_video=same_video,
        caption_ids=CAPTIONS,
        mask_equal_captions=equal_captions,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(x, similarity)[0] for x in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


@EXAMPLES
@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.sampled_from([0.02, 0.3, 1.0]),
    st.integers(0, 99),
    st.booleans(),
)
def test_losses_do_not_depend_on_the_split_over_ranks(
    kind: str, sizes: list[int], spread: float, seed: int, masked: bool
) -> None:
    whole = scores(sum(sizes), seed, spread).requires_grad_()
    ids = torch.randint(0, 4, (sum(sizes),), generator=torch.Generator().manual_seed(seed))
    options = {"video_ids": ids, "mask_same_video": masked}
    options |= {"caption_ids": ids.roll(1) // 2, "mask_equal_captions": seed % 2 == 0}
    expected = rows(kind, whole, 0, SINGLE_RANK, **options)
    expected.loss.backward()
    blocks = [block.clone().requires_grad_() for block in whole.detach().split(sizes)]

    def work(collectives: ThreadCollectives, rank: int) -> LossTerms:
        terms = rows(kind, blocks[rank], sum(sizes[:rank]), collectives, **options)
        terms.loss.backward()
        return terms

    shares = on_ranks(work, len(sizes))
    for name in LossTerms.__dataclass_fields__:
        total = torch.stack([getattr(share, name).detach() for share in shares]).sum()
        torch.testing.assert_close(total, getattr(expected, name).detach(), rtol=1e-12, atol=1e-14)
    gradient = torch.cat([block.grad for block in blocks])
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-10, atol=1e-14)


@EXAMPLES
@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(0, 99))
def test_losses_do_not_depend_on_the_order_of_pairs(kind: str, num_pairs: int, seed: int) -> None:
    similarity = scores(num_pairs, seed)
    order = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(square(kind, similarity[order][:, order]), square(kind, similarity))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_gradcheck(kind: str) -> None:
    similarity = scores(5, 3, spread=0.02).requires_grad_()
    ids = torch.tensor([0, 1, 2, 1, 3])
    assert torch.autograd.gradcheck(lambda x: square(kind, x), similarity)
    masked = {"video_ids": ids, "mask_same_video": True}
    assert torch.autograd.gradcheck(lambda x: square(kind, x, **masked), similarity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_log_mode_learns_at_extreme_scores(dtype: torch.dtype, ranks: int) -> None:
    # Pair 0 is 200 nats below a hard negative in both directions; pairs 1 and 2 are 50 below one.
    # These negatives have probability exactly 1. The `reference` mode gets no gradient at all.
    whole = torch.full((4, 4), -1.0, dtype=dtype)
    whole.fill_diagonal_(1.0)
    whole[0, 0], whole[0, 1], whole[2, 0] = -1.0, 1.0, 1.0
    whole[1, 1], whole[2, 2] = 0.5, 0.5
    reference = whole.clone().requires_grad_()
    neg_nce(reference).backward()
    assert reference.grad.count_nonzero() == 0

    blocks = [block.clone().requires_grad_() for block in whole.split(4 // ranks)]

    def work(collectives: ThreadCollectives, rank: int) -> Tensor:
        terms = rows("log", blocks[rank], rank * len(blocks[rank]), collectives)
        terms.loss.backward()
        return terms.loss

    loss = torch.stack(list(on_ranks(work, ranks))).sum()
    gradient = torch.cat([block.grad for block in blocks])
    assert loss.isfinite()
    assert loss > 90
    assert gradient.isfinite().all()
    assert (gradient.diagonal()[:3] < -10).all()
    assert gradient[0, 1] > 10
    assert gradient[2, 0] > 10


def test_log_penalty_of_a_certain_wrong_pair_is_its_lead_over_the_rest() -> None:
    # P(wrong) = 1 - e^-200, so -log(1 - P) = 200 in each direction, although 1 - P rounds to 0.
    similarity = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])
    terms = row_neg_nce(similarity, row_offset=0, collectives=SINGLE_RANK, mode="log", weight=1.0)
    # Row 0: -log P_00 = 200 and the penalty 200; row 1 has no hard negative and no loss.
    assert terms.text_to_video.item() == pytest.approx((200 + 200) / 2)
    # Both columns are ties: the positives have P = 1/2, and so has the pair that is hard by row.
    assert terms.video_to_text.item() == pytest.approx((2 * 0.6931472 + 0.6931472) / 2)


def test_log_mode_normalises_hard_negatives_per_row() -> None:
    # Row 0 has one hard negative, the other rows none: its penalty is 1/G of the row's mean.
    similarity = torch.eye(6, dtype=torch.float64) * 0.5
    similarity[0, 1] = 0.501
    plain = row_info_nce(similarity, row_offset=0, collectives=SINGLE_RANK).text_to_video
    log = row_neg_nce(similarity, row_offset=0, collectives=SINGLE_RANK, mode="log").text_to_video
    p = (100 * similarity[0]).softmax(0)[1]
    assert (log - plain).item() == pytest.approx(0.5 * -torch.log(1 - p).item() / 6)


def test_same_video_pairs_are_no_negatives() -> None:
    ids = torch.tensor([7, 8, 7, 9])
    similarity = scores(4, 1).requires_grad_()
    changed = similarity.detach().clone()
    changed[0, 2], changed[2, 0] = 5.0, -5.0
    for kind in KINDS:
        options = {"video_ids": ids, "mask_same_video": True}
        assert square(kind, changed, **options) == square(kind, similarity, **options)
        (gradient,) = torch.autograd.grad(square(kind, similarity, **options), similarity)
        assert gradient[0, 2] == gradient[2, 0] == 0
        assert gradient[0, 1] != 0
        assert square(kind, changed) != square(kind, similarity)


MASKS = {"video_ids": "mask_same_video", "caption_ids": "mask_equal_captions"}


@pytest.mark.parametrize("kind_of_ids", MASKS)
def test_a_mask_is_on_by_default_in_log_and_set_mode_only(kind_of_ids: str) -> None:
    ids, similarity = torch.tensor([7, 7, 9]), scores(3, 2)
    on, off = ({kind_of_ids: ids, MASKS[kind_of_ids]: x} for x in (True, False))
    for mode, default in (("log", on), ("set", on), ("reference", off)):
        actual = neg_nce(similarity, mode=mode, **{kind_of_ids: ids})
        assert actual == neg_nce(similarity, mode=mode, **default)
    assert info_nce(similarity, **{kind_of_ids: ids}) == info_nce(similarity, **off)
    assert neg_nce(similarity, mode="log", **on) != neg_nce(similarity, mode="log", **off)
    # All pairs have the same video, or the same caption, so there are no negatives.
    same = torch.zeros(3, dtype=torch.int64)
    for mode in ("log", "set"):
        assert neg_nce(similarity, mode=mode, **{kind_of_ids: same}) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_captions_without_an_equal_one_change_no_bit(kind: str) -> None:
    similarity = scores(7, 5).requires_grad_()
    options = {"video_ids": VIDEOS, "mask_same_video": True}
    compared = options | {"caption_ids": torch.arange(7), "mask_equal_captions": True}
    before, now = (square(kind, similarity, **each) for each in (options, compared))
    assert now == before
    gradients = [torch.autograd.grad(x, similarity)[0] for x in (now, before)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("same_video", "expected"), [(True, [1, 0, 0, 2, 1, 1, 1]), (False, [2, 0, 0, 2, 1, 1, 2])]
)
def test_pairs_excluded_for_their_caption_alone_are_counted(
    same_video: bool, expected: list[int]
) -> None:
    # Pairs 0 and 6 share both the video and the caption.
    ids = {"video_ids": VIDEOS, "mask_same_video": same_video, "caption_ids": CAPTIONS}
    options: dict[str, Any] = ids | {"collectives": SINGLE_RANK, "mode": "log"}
    for first, end in ((0, 7), (2, 5), (6, 7)):
        options["row_offset"] = first
        terms = row_neg_nce(scores(7, 0)[first:end], **options)
        assert terms.equal_captions_per_row == pytest.approx(sum(expected[first:end]) / 7)
    off = row_neg_nce(scores(7, 0)[6:], mask_equal_captions=False, **options)
    assert off.equal_captions_per_row == 0


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_becomes_float32_before_scaling(kind: str) -> None:
    low = scores(5, 4).to(torch.bfloat16).requires_grad_()
    loss = square(kind, low)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, square(kind, low.detach().float()))
    loss.backward()
    assert low.grad.dtype == torch.bfloat16
    assert low.grad.count_nonzero() > 0


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: neg_nce(scores(3, 0), mode="plain"), "mode='plain'"),
        (lambda: info_nce(scores(3, 0), mask_same_video=True), "video_ids"),
        (lambda: info_nce(scores(3, 0), mask_equal_captions=True), "needs caption_ids"),
        (lambda: LossRule(None).excluded_pairs(3, None, CAPTIONS), r"caption_ids has .*\(7,"),
        (lambda: rows("info", scores(4, 0)[:2], 3, SINGLE_RANK), "row_offset=3"),
        (lambda: rows("info", scores(4, 0)[:2], -1, SINGLE_RANK), "row_offset=-1"),
        (lambda: info_nce.__wrapped__(scores(4, 0)[:2]), "square"),
    ],
)
def test_errors_name_the_argument(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
