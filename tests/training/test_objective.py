"""The objective on one process: value and gradients against the definition, and statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tvr.kernels import losses, reference
from tvr.kernels.numerics import unit
from tvr.trainer.config import LossConfig, ModelConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.loss.objective import objective
from tvr.trainer.model.model import Features
from tvr.trainer.monitoring.step_record import LOSS_TERMS, computed_terms

SINGLE_RANK = World(rank=0, world_size=1, device=torch.device("cpu"))
PAIRS, WORDS, FRAMES, WIDTH = 6, 5, 4, 8
VIDEO_IDS = torch.tensor([7, 8, 7, 9, 8, 2**62])  # two videos with two captions each
# Two captions of two videos each; pairs 1 and 4 have the same video and the same caption.
CAPTION_IDS = torch.tensor([3, 2**62 + 1, 4, 3, 2**62 + 1, 4])


def features() -> Features:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    lengths = torch.tensor([5, 3, 4, 2, 5, 3])
    return Features(
        sentence=unit(random(PAIRS, WIDTH)).requires_grad_(),
        words=unit(random(PAIRS, WORDS, WIDTH)).requires_grad_(),
        word_mask=(torch.arange(WORDS) < lengths[:, None]).long(),
        frames=unit(random(PAIRS, FRAMES, WIDTH)).requires_grad_(),
        frame_mask=(torch.arange(FRAMES) < (lengths - 1)[:, None]).long(),
        word_logits=random(PAIRS, WORDS).requires_grad_(),
        frame_logits=random(PAIRS, FRAMES).requires_grad_(),
        margin_hinge=random(PAIRS).abs().requires_grad_(),
    )


def values(
    loss: LossConfig,
    model: ModelConfig | None = None,
    own: Features | None = None,
    scores: Literal["keep", "stream"] = "keep",
) -> dict[str, float]:
    result = objective(
        own or features(),
        VIDEO_IDS,
        model or ModelConfig(),
        loss,
        SINGLE_RANK,
        caption_ids=CAPTION_IDS,
        scores=scores,
    )
    return dict(zip(LOSS_TERMS, result.shares.tolist(), strict=True))


def similarity(own: Features, model: ModelConfig) -> Tensor:
    return reference.dmae_similarity(
        own.sentence,
        own.words,
        own.frames,
        own.word_mask,
        own.frame_mask,
        interaction=model.interaction,
        matching=model.matching,
        neighbour_frames=model.neighbour_frames,
        word_logits=own.word_logits,
        frame_logits=own.frame_logits,
    )


def expected_loss(square: Tensor, loss: LossConfig) -> Tensor:
    scale = 1 / loss.temperature
    if loss.similarity == "info_nce":
        return losses.info_nce(
            square,
            video_ids=VIDEO_IDS,
            mask_same_video=loss.mask_same_video is True,
            caption_ids=CAPTION_IDS,
            mask_equal_captions=loss.mask_equal_captions is True,
            scale=scale,
            hardness=loss.hardness,
            drop_above=loss.drop_above,
        )
    if loss.similarity == "sigmoid":
        return losses.sigmoid_loss(
            square,
            bias=loss.sigmoid_bias,
            video_ids=VIDEO_IDS,
            mask_same_video=loss.mask_same_video is True,
            scale=scale,
            drop_above=loss.drop_above,
        )
    return losses.neg_nce(
        square,
        mode=loss.neg_nce_mode,
        video_ids=VIDEO_IDS,
        mask_same_video=loss.mask_same_video,
        caption_ids=CAPTION_IDS,
        mask_equal_captions=loss.mask_equal_captions,
        scale=scale,
        weight=loss.neg_nce_weight,
        hardness=loss.hardness,
        drop_above=loss.drop_above,
    )


SETTINGS: list[dict[str, Any]] = [
    {"similarity": "info_nce"},
    {"similarity": "info_nce", "mask_same_video": True, "temperature": 0.05},
    {"similarity": "info_nce", "mask_equal_captions": True},
    {"neg_nce_mode": "reference"},
    {"neg_nce_mode": "reference", "mask_same_video": True, "neg_nce_weight": 2.0},
    {"neg_nce_mode": "log"},
    {"neg_nce_mode": "log", "mask_same_video": False, "temperature": 0.1},
    {"neg_nce_mode": "log", "mask_equal_captions": False},
    {"neg_nce_mode": "reference", "mask_equal_captions": True},
    {"neg_nce_mode": "log", "neg_nce_weight": 0.0, "tpm_cl_weight": 0.25},
    {"neg_nce_mode": "set"},
    {"neg_nce_mode": "set", "hardness": 0.5, "drop_above": 0.2, "mask_same_video": False},
    {"similarity": "info_nce", "hardness": 1.0, "temperature": 0.1},
    {"similarity": "sigmoid", "sigmoid_bias": -3.0, "temperature": 0.1},
    {"similarity": "sigmoid", "drop_above": 0.1, "mask_same_video": True},
]
MODELS: list[dict[str, Any]] = [
    {},
    {"interaction": "att_ti", "neighbour_frames": False},
    {"interaction": "wti"},
    {"interaction": "ti"},
    {"matching": "words_to_frames"},
]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"exchange": "ring"},
    {"scores": "stream"},
    {"exchange": "ring", "scores": "stream"},
]


@pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda variant: "-".join(variant.values()) or "default"
)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_value_and_gradients_equal_the_definition(
    settings: dict[str, Any], model: dict[str, Any], variant: dict[str, Any]
) -> None:
    loss, model_config = LossConfig(**settings), ModelConfig(**model)
    own, other = features(), features()
    variant = variant | {"caption_ids": CAPTION_IDS}
    result = objective(own, VIDEO_IDS, model_config, loss, SINGLE_RANK, **variant)
    square = similarity(other, model_config)
    assert other.margin_hinge is not None
    margin = other.margin_hinge.mean()
    expected = expected_loss(square, loss) + loss.tpm_cl_weight * margin

    got = dict(zip(LOSS_TERMS, result.shares.tolist(), strict=True))
    assert result.for_backward.item() == pytest.approx(expected.item(), rel=1e-12)
    assert got["loss"] == result.for_backward.item()
    assert got["similarity_loss"] == pytest.approx(expected_loss(square, loss).item(), rel=1e-12)
    assert got["tpm_cl_loss"] == pytest.approx(margin.item(), rel=1e-12)
    assert not result.shares.requires_grad

    result.for_backward.backward()
    expected.backward()
    for name in ("sentence", "words", "frames", "word_logits", "frame_logits", "margin_hinge"):
        ours, theirs = getattr(own, name).grad, getattr(other, name).grad
        if theirs is None:
            assert ours is None, name
        else:
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("mask", ["mask_same_video", "mask_equal_captions"])
@pytest.mark.parametrize(
    ("settings", "by_default"),
    [
        ({"similarity": "info_nce"}, False),
        ({"neg_nce_mode": "reference"}, False),
        ({"neg_nce_mode": "log"}, True),
        ({"neg_nce_mode": "set"}, True),
        ({"similarity": "sigmoid"}, False),
    ],
)
def test_a_mask_is_on_off_or_by_default(
    settings: dict[str, Any], by_default: bool, mask: str
) -> None:
    on, off, default = (
        values(LossConfig(**settings | {mask: value}))["similarity_loss"]
        for value in (True, False, None)
    )
    # Fewer negatives in every denominator; a mean over hard negatives may become larger.
    assert on != off if "neg_nce_mode" in settings else on < off
    assert default == (on if by_default else off)


def test_the_temperature_divides_the_similarity() -> None:
    own, model = features(), ModelConfig()
    logits = similarity(own, model)
    for temperature in (0.01, 0.5):
        loss = LossConfig(similarity="info_nce", temperature=temperature)
        rows = (logits / temperature).log_softmax(dim=1).diagonal().mean()
        columns = (logits / temperature).log_softmax(dim=0).diagonal().mean()
        expected = -(rows + columns).item() / 2
        assert values(loss)["similarity_loss"] == pytest.approx(expected, rel=1e-10)


def test_tpm_cl_is_weighted_or_left_out() -> None:
    for weight in (0.0, 0.5, 3.0):
        got = values(LossConfig(tpm_cl_weight=weight))
        assert got["tpm_cl_loss"] > 0
        assert got["loss"] == pytest.approx(
            got["similarity_loss"] + weight * got["tpm_cl_loss"], rel=1e-12
        )
    off = values(LossConfig(tpm_cl=0), own=features()._replace(margin_hinge=None))
    assert off["tpm_cl_loss"] == 0.0
    assert off["loss"] == off["similarity_loss"] == values(LossConfig())["similarity_loss"]


def test_the_statistics_count_hard_negatives_and_clamped_positives() -> None:
    loss = LossConfig(neg_nce_mode="reference", mask_same_video=False)
    got = values(loss)
    square = similarity(features(), ModelConfig()).detach()
    positive = square.diagonal()
    hard = (square > positive[:, None]) | (square > positive)
    assert got["hard_negatives_per_row"] == pytest.approx(int(hard.sum()) / PAIRS)
    assert 0 < got["hard_negatives_per_row"] < PAIRS - 1
    shares = [(square / loss.temperature).softmax(dim=dim).diagonal() for dim in (0, 1)]
    clamped = sum(int((share < 1e-6).sum()) for share in shares) / (2 * PAIRS)
    assert got["clamped_share"] == pytest.approx(clamped)
    assert 0 < clamped < 1
    without = values(replace(loss, neg_nce_weight=0.0))
    assert got["penalty"] == pytest.approx(got["similarity_loss"] - without["similarity_loss"])
    assert got["penalty"] > without["penalty"] == 0.0
    masked = values(LossConfig(neg_nce_mode="reference", mask_same_video=True))
    assert masked["hard_negatives_per_row"] < got["hard_negatives_per_row"]
    assert values(LossConfig(similarity="info_nce"))["clamped_share"] == 0.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 4 / 6),  # pairs 0 and 3, pairs 2 and 5
        ({"mask_same_video": False}, 1.0),  # and pairs 1 and 4
        ({"mask_equal_captions": False}, None),
        ({"neg_nce_mode": "reference"}, None),
        ({"similarity": "info_nce"}, None),
        ({"neg_nce_mode": "set"}, 4 / 6),
        ({"similarity": "sigmoid"}, None),
        ({"similarity": "info_nce", "mask_equal_captions": True}, 1.0),
    ],
)
def test_pairs_that_are_masked_for_their_caption_are_counted(
    settings: dict[str, Any], expected: float | None
) -> None:
    loss = LossConfig(**settings)
    found = computed_terms(values(loss), loss)["equal_captions_per_row"]
    assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("scores", ["keep", "stream"])
def test_dropped_negatives_are_counted(scores: Literal["keep", "stream"]) -> None:
    off = LossConfig(similarity="info_nce")
    assert computed_terms(values(off, scores=scores), off)["dropped_per_row"] is None
    loss = LossConfig(similarity="info_nce", drop_above=0.1)
    square = similarity(features(), ModelConfig()).detach()
    expected = int((square > square.diagonal()[:, None] + 0.1).sum()) / PAIRS
    assert 0 < expected < 4
    found = computed_terms(values(loss, scores=scores), loss)
    assert found["dropped_per_row"] == pytest.approx(expected)
    assert found["penalty"] is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"similarity": "sigmoid", "hardness": 0.5}, r"loss.hardness=0.5 needs"),
        ({"neg_nce_mode": "reference", "hardness": 0.5}, r"loss.hardness=0.5 needs"),
        ({"neg_nce_mode": "reference", "drop_above": 0.0}, r"loss.drop_above=0.0 needs"),
        ({"hardness": -1.0}, "greater than or equal to 0"),
        ({"drop_above": -1.0}, "greater than or equal to 0"),
        ({"hardness": float("inf")}, "finite"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        LossConfig(**settings)
    # The mode of NegNCE has no meaning for another loss.
    LossConfig(similarity="info_nce", neg_nce_mode="reference", hardness=0.5, drop_above=0.1)


@pytest.mark.parametrize("scores", ["keep", "stream"])
@pytest.mark.parametrize("masked", [True, False])
def test_the_statistics_hold_the_similarities_of_positives_and_hardest_negatives(
    scores: Literal["keep", "stream"], masked: bool
) -> None:
    loss = LossConfig(mask_same_video=masked, mask_equal_captions=False)
    got = values(loss, scores=scores)
    square = similarity(features(), ModelConfig()).detach()
    assert got["positive_similarity"] == pytest.approx(float(square.diagonal().mean()))
    same = VIDEO_IDS[:, None] == VIDEO_IDS if masked else torch.eye(PAIRS, dtype=torch.bool)
    hardest = square.masked_fill(same, -torch.inf).amax(1)
    assert got["hardest_similarity"] == pytest.approx(float(hardest.mean()))


def test_separated_pairs_have_no_hard_negative() -> None:
    vectors = torch.eye(PAIRS, WIDTH)
    own = Features(
        sentence=vectors,
        words=vectors[:, None],
        word_mask=torch.ones(PAIRS, 1, dtype=torch.long),
        frames=vectors[:, None],
        frame_mask=torch.ones(PAIRS, 1, dtype=torch.long),
        word_logits=torch.zeros(PAIRS, 1),
        frame_logits=torch.zeros(PAIRS, 1),
        margin_hinge=None,
    )
    for mode in ("reference", "log"):
        got = values(LossConfig(neg_nce_mode=mode), own=own)
        assert got["hard_negatives_per_row"] == got["clamped_share"] == 0.0
        assert got["loss"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("scores", ["keep", "stream"])
def test_only_the_fast_similarity_rounds_the_loss(scores: Any) -> None:
    loss = LossConfig(temperature=0.1)

    def share(fast: bool) -> float:
        found = objective(
            features(),
            VIDEO_IDS,
            ModelConfig(),
            loss,
            SINGLE_RANK,
            caption_ids=CAPTION_IDS,
            scores=scores,
            fast=fast,
        )
        return float(found.shares[0])

    assert share(fast=False) == pytest.approx(values(loss)["loss"], rel=1e-12)
    assert 1e-6 < abs(share(fast=True) / share(fast=False) - 1) < 1e-2


@pytest.mark.parametrize("scores", ["keep", "stream"])
def test_every_similarity_backend_gives_the_same_loss(scores: Any) -> None:
    loss = LossConfig(temperature=0.1)
    for backend in ("auto", "compiled", "torch", "dense"):
        found = objective(
            features(),
            VIDEO_IDS,
            ModelConfig(),
            loss,
            SINGLE_RANK,
            caption_ids=CAPTION_IDS,
            scores=scores,
            backend=backend,
        )
        assert float(found.shares[0]) == pytest.approx(values(loss)["loss"], rel=1e-12)
    with pytest.raises(ValueError, match="must be one of compiled, torch, dense"):
        objective(features(), VIDEO_IDS, ModelConfig(), loss, SINGLE_RANK, backend="cublas")
