"""NegNCE's mode `set`, hardness weights, `drop_above` and the sigmoid loss, against plain formulas.

The formulas below are written from the definitions, on the whole square, with autograd's gradient.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from builders.ranks_in_threads import ThreadCollectives, on_ranks
from builders.similarity_inputs import similarity_inputs
from torch import Tensor
from torch.nn import functional

from tvr.kernels import reference
from tvr.kernels.losses import LossTerms, info_nce, neg_nce, row_loss, row_neg_nce, sigmoid_loss
from tvr.kernels.row_loss import stored_loss
from tvr.kernels.row_loss.loss_rule import LossRule
from tvr.kernels.row_loss.online_softmax import SINGLE_RANK
from tvr.kernels.row_loss.streamed_loss import streamed_loss

DROP = 0.03
RULES = {
    "set": LossRule("set"),
    "set, weighted": LossRule("set", hardness=0.5, weight=2.0),
    "set, dropped": LossRule("set", drop_above=DROP),
    "set, all": LossRule("set", hardness=0.25, drop_above=DROP),
    "log, all": LossRule("log", hardness=0.5, drop_above=DROP),
    "info_nce, weighted": LossRule(None, hardness=1.0),
    "info_nce, dropped": LossRule(None, drop_above=0.0),
    "sigmoid": LossRule(None, sigmoid=True, sigmoid_bias=-2.0),
    "sigmoid, dropped": LossRule(None, sigmoid=True, drop_above=DROP),
}
PAIRS = 7
VIDEOS, CAPTIONS = torch.tensor([0, 1, 1, 2, 0, 3, 0]), torch.tensor([5, 6, 7, 5, 8, 8, 5])
NO_IDS = torch.arange(PAIRS)
SPLITS = [(7,), (3, 4), (1, 5, 1), (2, 1, 1, 3), (0, 3, 0, 4)]


def scores(num_pairs: int = PAIRS, seed: int = 0, spread: float = 0.02) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_pairs, num_pairs, generator=generator, dtype=torch.float64)
    return spread * noise + 0.02 * torch.eye(num_pairs)


def excluded_pairs(videos: Tensor, captions: Tensor) -> Tensor:
    return ((videos[:, None] == videos) | (captions[:, None] == captions)).fill_diagonal_(False)


def plain_direction(similarity: Tensor, excluded: Tensor, rule: LossRule) -> Tensor:
    """One direction of the loss, along rows."""
    matched = torch.eye(len(similarity), dtype=torch.bool)
    positive, values = similarity.diagonal(), similarity.detach()
    negative = ~excluded & ~matched
    if rule.drop_above is not None:
        negative &= ~(values > values.diagonal()[:, None] + rule.drop_above)
    logits = rule.scale * similarity
    if rule.sigmoid:
        losses = functional.binary_cross_entropy_with_logits(
            logits + rule.sigmoid_bias, matched.double(), reduction="none"
        )
        return losses[matched | negative].sum() / len(similarity)
    weights = torch.ones_like(values)
    if rule.hardness:
        powers = (rule.hardness * logits.detach()).exp() * negative
        weights = powers * (negative.sum(1) / powers.sum(1).clamp_min(1e-300))[:, None]
    parts = logits.exp() * torch.where(matched, 1.0, weights * negative)
    p = parts / parts.sum(1, keepdim=True)
    loss = -p.diagonal().log()
    hard = ((similarity > positive[:, None]) | (similarity > positive)) & negative
    for row in range(len(similarity)):
        found = p[row][hard[row]]
        if rule.neg_nce_mode == "set":
            loss = loss - rule.weight * (1 - found.sum()).log() * matched[row]
        elif rule.neg_nce_mode == "log" and len(found):
            loss = loss - rule.weight * (1 - found).log().mean() * matched[row]
    return loss.mean()


def plain_loss(similarity: Tensor, excluded: Tensor, rule: LossRule) -> tuple[Tensor, Tensor]:
    """Text-to-video and video-to-text."""
    rows = plain_direction(similarity, excluded, rule)
    return rows, plain_direction(similarity.T, excluded.T, rule)


def square_terms(similarity: Tensor, rule: LossRule, **ids) -> LossTerms:
    return row_loss(similarity, rule, row_offset=0, collectives=SINGLE_RANK, **ids)


def masked(rule: LossRule) -> LossRule:
    return LossRule(**(vars(rule) | {"mask_same_video": True, "mask_equal_captions": True}))


@pytest.mark.parametrize("rows_per_chunk", [2, PAIRS])
@pytest.mark.parametrize("ids", [(NO_IDS, NO_IDS), (VIDEOS, CAPTIONS)], ids=["all", "masked"])
@pytest.mark.parametrize("name", RULES)
def test_value_and_gradient_equal_the_formula(
    name: str, ids: tuple[Tensor, Tensor], rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_loss, "SCORES_PER_CHUNK", rows_per_chunk * PAIRS)
    similarity, rule = scores().requires_grad_(), masked(RULES[name])
    terms = square_terms(similarity, rule, video_ids=ids[0], caption_ids=ids[1])
    expected = plain_loss(similarity, excluded_pairs(*ids), rule)
    for ours, theirs in zip((terms.text_to_video, terms.video_to_text), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
        gradients = [
            torch.autograd.grad(x, similarity, retain_graph=True)[0] for x in (ours, theirs)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-11)


def test_the_forms_differ_on_these_scores() -> None:
    # Otherwise the comparison above would prove nothing.
    found = [float(square_terms(scores(), rule).loss) for rule in RULES.values()]
    found += [float(info_nce(scores())), float(neg_nce(scores(), mode="log"))]
    ordered = sorted(found)
    assert all(b - a > 1e-3 for a, b in pairwise(ordered))


@pytest.mark.parametrize("spread", [0.02, 1.0])
@pytest.mark.parametrize("name", RULES)
def test_any_split_over_ranks_gives_the_same(name: str, spread: float) -> None:
    rule, whole = masked(RULES[name]), scores(spread=spread).requires_grad_()
    ids = {"video_ids": VIDEOS, "caption_ids": CAPTIONS}
    expected = square_terms(whole, rule, **ids)
    expected.loss.backward()
    assert whole.grad is not None
    for sizes in SPLITS:
        blocks = [block.clone().requires_grad_() for block in whole.detach().split(list(sizes))]

        def work(
            collectives: ThreadCollectives, rank: int, blocks=blocks, sizes=sizes
        ) -> LossTerms:
            options = {"row_offset": sum(sizes[:rank]), "collectives": collectives}
            terms = row_loss(blocks[rank], rule, **options, **ids)
            terms.loss.backward()
            return terms

        shares = on_ranks(work, len(sizes))
        for field in LossTerms.__dataclass_fields__:
            total = torch.stack([getattr(share, field).detach() for share in shares]).sum()
            value = getattr(expected, field).detach()
            torch.testing.assert_close(total, value, rtol=1e-12, atol=1e-13)
        gradient = torch.cat([block.grad for block in blocks])
        torch.testing.assert_close(gradient, whole.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("keep_scores", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_the_streamed_loss_equals_the_formula(name: str, keep_scores: bool) -> None:
    rule = LossRule(**(vars(RULES[name]) | {"scale": 10.0}))
    arguments = similarity_inputs(PAIRS, PAIRS)
    ours, theirs = (
        {key: x.clone().requires_grad_(x.is_floating_point()) for key, x in arguments.items()}
        for _ in range(2)
    )
    expected = plain_loss(reference.dmae_similarity(**theirs), excluded_pairs(NO_IDS, NO_IDS), rule)
    (sum(expected) / 2).backward()
    for chunk in (1, 3, None):
        for x in ours.values():
            x.grad = None
        options = {"chunk": chunk, "keep_scores": keep_scores}
        terms = streamed_loss(**ours, rule=rule, **options)
        terms.loss.backward()
        torch.testing.assert_close(
            torch.stack([terms.text_to_video, terms.video_to_text]),
            torch.stack(expected),
            rtol=1e-10,
            atol=0,
        )
        for key, x in ours.items():
            if x.requires_grad:
                torch.testing.assert_close(x.grad, theirs[key].grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in RULES if not RULES[name].hardness])
def test_gradients_pass_gradcheck(name: str) -> None:
    # The weights of `hardness` carry no gradient, so a difference quotient is not its gradient.
    similarity = scores(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: square_terms(x, RULES[name]).loss, similarity)


def test_hardness_weights_have_mean_one_and_no_gradient() -> None:
    # Negatives at 0 and at log 3 / 100, beta 1: weights 2 x (1/4, 3/4), so the row's denominator
    # is e^l + 1/2 x 1 + 3/2 x 3 = e^l + 5.
    similarity = torch.tensor(
        [[0.01, 0.0, 0.01 * math.log(3)], [-9.0, 9.0, -9.0], [-9.0, -9.0, 9.0]],
        dtype=torch.float64,
    ).requires_grad_()
    rule = LossRule(None, hardness=1.0)
    loss = square_terms(similarity, rule).text_to_video
    e = torch.tensor(1.0, dtype=torch.float64).exp()
    torch.testing.assert_close(loss, (1 + 5 / e).log() / 3, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, similarity)
    expected = 100 / 3 * torch.stack([-5 / (e + 5), 0.5 / (e + 5), 4.5 / (e + 5)])
    torch.testing.assert_close(gradient[0], expected, rtol=1e-12, atol=0)


def test_hardness_zero_changes_no_bit() -> None:
    for mode in (None, "log", "set"):
        losses = [square_terms(scores(), LossRule(mode, hardness=x)).loss for x in (0.0, 1e-9)]
        assert losses[0] == square_terms(scores(), LossRule(mode)).loss
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)


# ---------------------------------------------------------------- the mode `set`


@pytest.mark.parametrize("lead", [-0.2, 0.001, 0.02, 0.3, 2.0])
def test_set_equals_log_for_one_hard_negative_a_row(lead: float) -> None:
    # Row i's only hard negative is i + 1, by its row and its column; 1 - P rounds to 0 at lead 2.
    similarity = 0.1 * torch.eye(6, dtype=torch.float64) - 0.05 * torch.rand(
        6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    for i in range(6):
        similarity[i, (i + 1) % 6] = similarity.diagonal().max() + lead
    values, gradients = [], []
    for mode in ("set", "log"):
        leaf = similarity.clone().requires_grad_()
        terms = square_terms(leaf, LossRule(mode))
        assert terms.hard_negatives_per_row == (1 if lead > 0 else 0)
        values.append(torch.stack([terms.loss, terms.penalty]))
        gradients.append(torch.autograd.grad(terms.loss, leaf)[0])
    torch.testing.assert_close(*values, rtol=1e-14, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_set_depends_on_the_mass_of_the_hard_set_alone() -> None:
    # One hard negative's mass is shared by k equal ones; the positive stays below each.
    def penalty(mode: str, k: int) -> float:
        similarity = torch.full((9, 9), -1.0, dtype=torch.float64).fill_diagonal_(1.0)
        similarity[0] = -1.0
        similarity[0, 0] = -0.5
        similarity[0, 1 : 1 + k] = -math.log(k) / 100
        return square_terms(similarity, LossRule(mode)).penalty.item()

    assert penalty("set", 8) == pytest.approx(penalty("set", 1), rel=1e-12)
    assert penalty("log", 8) < 0.01 * penalty("log", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_set_learns_at_extreme_scores(dtype: torch.dtype) -> None:
    # Two hard negatives 200 nats above the positive: P(H) rounds to 1.
    similarity = torch.full((4, 4), -1.0, dtype=dtype).fill_diagonal_(1.0)
    similarity[0, :3] = torch.tensor([-1.0, 1.0, 1.0])
    similarity.requires_grad_()
    terms = row_neg_nce(similarity, row_offset=0, collectives=SINGLE_RANK, mode="set", weight=1.0)
    # -log(1 - P(H)) = log(2 e^200 / 2): row 0's positive and its last entry are the others.
    assert terms.text_to_video.item() == pytest.approx((200 + 0.6931472 + 200) / 4, rel=1e-6)
    terms.text_to_video.backward()
    gradient = similarity.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    # InfoNCE's 100 / 4 x (-1, 1/2, 1/2, 0), and the penalty's 100 / 4 x (-1/2, 1/2, 1/2, -1/2).
    expected = torch.tensor([-37.5, 25.0, 25.0, -12.5], dtype=dtype)
    torch.testing.assert_close(gradient[0], expected, rtol=1e-2, atol=0)


def test_without_hard_negatives_set_is_info_nce() -> None:
    similarity = (torch.eye(5, dtype=torch.float64) * 0.5).requires_grad_()
    of_set = square_terms(similarity, LossRule("set"))
    assert of_set.penalty == of_set.hard_negatives_per_row == 0
    assert of_set.loss == info_nce(similarity)
    gradients = [torch.autograd.grad(x, similarity)[0] for x in (of_set.loss, info_nce(similarity))]
    assert torch.equal(*gradients)
    # Nothing but excluded pairs, and a single pair.
    same = torch.zeros(5, dtype=torch.int64)
    assert neg_nce(scores(5), mode="set", video_ids=same) == 0
    for rule in RULES.values():
        if not rule.sigmoid:
            assert square_terms(scores(1).requires_grad_(), rule).loss == 0


def test_a_small_mass_keeps_its_digits() -> None:
    # Row 0's hard negative lies 46 nats below its positive and above that of its column: 1 - P(H)
    # rounds to 1, and so does the positive's P.
    similarity = torch.tensor([[0.46, 0.0], [-5.0, -1.0]], dtype=torch.float64)
    terms = row_neg_nce(similarity, row_offset=0, collectives=SINGLE_RANK, mode="set", weight=1.0)
    assert terms.hard_negatives_per_row == 0.5
    assert terms.text_to_video.item() == pytest.approx(math.exp(-46) / 2, rel=1e-12)


# ---------------------------------------------------------------- drop_above


def test_a_negative_is_dropped_above_the_margin_in_its_direction_only() -> None:
    # Powers of two, so that the sums are exact. Row 0: a tie with the margin stays, one above it
    # goes. Column 2 has a high positive: in the other direction nothing is dropped.
    similarity = torch.full((3, 3), -1.0, dtype=torch.float64).fill_diagonal_(0.5)
    similarity[0, 1], similarity[0, 2], similarity[2, 2] = 0.75, 0.875, 2.0
    similarity.requires_grad_()
    for rule in (LossRule(None, drop_above=0.25), LossRule("set", drop_above=0.25)):
        terms = square_terms(similarity, rule)
        assert terms.dropped_per_row.item() == pytest.approx(1 / 3)
        assert terms.hard_negatives_per_row.item() == pytest.approx(1 / 3)
        assert terms.hardest_similarity.item() == pytest.approx((0.75 - 1 - 1) / 3)
        (rows,) = torch.autograd.grad(terms.text_to_video, similarity, retain_graph=True)
        (columns,) = torch.autograd.grad(terms.video_to_text, similarity)
        assert rows[0, 2] == 0
        assert rows[0, 1] > 0
        assert columns[0, 2] > 0
    off = square_terms(similarity, LossRule(None))
    assert off.dropped_per_row == 0
    assert square_terms(similarity, LossRule(None, drop_above=9.0)).loss == off.loss


def test_an_excluded_pair_is_not_counted_as_dropped() -> None:
    similarity = torch.full((3, 3), -1.0).fill_diagonal_(0.0)
    similarity[0, 1] = 1.0
    rule = LossRule("set", drop_above=0.5)
    assert square_terms(similarity, rule).dropped_per_row.item() == pytest.approx(1 / 3)
    ids = torch.tensor([0, 0, 1])
    assert square_terms(similarity, rule, video_ids=ids).dropped_per_row == 0


# ---------------------------------------------------------------- sigmoid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_is_exact_at_extreme_scores(dtype: torch.dtype) -> None:
    similarity = torch.tensor([[-2.0, 2.0], [-2.0, 2.0]], dtype=dtype, requires_grad=True)
    loss = sigmoid_loss(similarity, bias=0.0)
    loss.backward()
    assert loss.item() == pytest.approx((200 + 200) / 2)
    expected = torch.tensor([[-50.0, 50.0], [0.0, 0.0]], dtype=dtype)
    assert similarity.grad is not None
    torch.testing.assert_close(similarity.grad, expected, rtol=1e-6, atol=1e-12)


def test_the_directions_of_sigmoid_differ_only_by_dropped_pairs() -> None:
    terms = square_terms(scores(), LossRule(None, sigmoid=True))
    torch.testing.assert_close(terms.text_to_video, terms.video_to_text, rtol=1e-14, atol=0)
    assert terms.penalty == terms.clamped_share == 0
    assert terms.hard_negatives_per_row > 0


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: LossRule("none"), "'reference', 'log' or 'set'"),
        (lambda: LossRule(None, hardness=-0.5), "hardness=-0.5 .* at least 0"),
        (lambda: LossRule(None, hardness=float("inf")), "hardness=inf"),
        (lambda: LossRule(None, drop_above=-0.1), "drop_above=-0.1 .* at least 0"),
        (lambda: LossRule("set", sigmoid=True), "mode None, not 'set'"),
        (lambda: LossRule(None, hardness=1.0, sigmoid=True), "hardness=1.0 .* softmax"),
        (lambda: LossRule("reference", hardness=1.0), "'log' or 'set'"),
        (lambda: neg_nce(scores(), drop_above=0.1), "drop_above=0.1"),
        (lambda: sigmoid_loss(scores(), mask_same_video=True), "video_ids"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
