"""The loss and its gradients are queued without one read of a value by the host.

Tensors on the `meta` device have shapes and no values, so whatever asks for a value, for a shape
that depends on one, or for a copy on the host raises. The code takes a GPU's way for them.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from builders.partial_inputs import partial_inputs
from builders.similarity_inputs import FEATURES, similarity_inputs
from torch import Tensor

from tvr.kernels.backends import torch_tiles
from tvr.kernels.losses import row_loss
from tvr.kernels.partial import tpm_cl
from tvr.kernels.row_loss.online_softmax import SINGLE_RANK
from tvr.kernels.row_loss.row_loss import LossRule
from tvr.kernels.row_loss.streamed_loss import streamed_loss
from tvr.kernels.similarity import dmae_similarity
from tvr.kernels.text_lengths import TextLengths, host_lengths

PAIRS = 9
RULES = [
    LossRule(None),
    LossRule("log"),
    LossRule("reference", mask_same_video=True),
    LossRule("set", hardness=0.5, drop_above=0.1),
    LossRule(None, sigmoid=True),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two texts and eight videos, so that the loops run several times.
    monkeypatch.setattr(torch_tiles, "SCORES_PER_TILE", 4 * 4 * 6 * 4)
    # `meta` has no autocast to turn off.
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())


def without_values(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of these shapes on `meta`; features need gradients."""
    made = {name: torch.empty_like(x, device="meta") for name, x in inputs.items()}
    return {name: x.requires_grad_(name in FEATURES) for name, x in made.items()}


def real_inputs() -> tuple[dict[str, Tensor], TextLengths]:
    inputs = similarity_inputs(PAIRS, PAIRS, dtype=torch.float32)
    return inputs, host_lengths(inputs["word_mask"], inputs["frame_mask"])


REAL_INPUTS, LENGTHS = real_inputs()


def assert_has_gradients(inputs: dict[str, Tensor]) -> None:
    for name in FEATURES:
        gradient = inputs[name].grad
        assert gradient is not None, name
        assert gradient.is_meta, name


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.neg_nce_mode))
@pytest.mark.parametrize("fast", [False, True])
def test_the_loss_of_stored_scores_reads_nothing(rule: LossRule, fast: bool) -> None:
    inputs = without_values(REAL_INPUTS)
    block = dmae_similarity(**inputs, fast=fast, lengths=LENGTHS)
    ids = torch.empty(PAIRS, dtype=torch.int64, device="meta")
    terms = row_loss(
        block, rule, row_offset=0, collectives=SINGLE_RANK, video_ids=ids, caption_ids=ids
    )
    terms.loss.backward()
    assert_has_gradients(inputs)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.neg_nce_mode))
@pytest.mark.parametrize("keep_scores", [False, True])
def test_the_streamed_loss_reads_nothing(rule: LossRule, keep_scores: bool) -> None:
    inputs = without_values(REAL_INPUTS)
    ids = torch.empty(PAIRS, dtype=torch.int64, device="meta")
    terms = streamed_loss(
        **inputs,
        rule=rule,
        video_ids=ids,
        caption_ids=ids,
        keep_scores=keep_scores,
        lengths=LENGTHS,
    )
    terms.loss.backward()
    assert_has_gradients(inputs)


def test_tpm_cl_reads_nothing() -> None:
    inputs = partial_inputs(pairs=5)
    del inputs["frame_weight_layer"]
    inputs = without_values(inputs)
    margins = tpm_cl(**inputs, frame_weight_layer=None, chunk=2, check_mask=False)
    margins.hinge.sum().backward()
    assert inputs["words"].grad is not None


def test_without_lengths_the_masks_are_read() -> None:
    # So the tests above would notice a read.
    inputs = without_values(REAL_INPUTS)
    with pytest.raises(NotImplementedError, match="no data"):
        dmae_similarity(**inputs)
