"""One token and one frame: the similarity is a matrix product, and no tile is computed."""

from typing import Any

import pytest
import torch
from builders.similarity_inputs import (
    FEATURES,
    assert_all_close,
    scores_and_gradients,
    similarity_inputs,
)
from torch import Tensor

from tvr.kernels import reference
from tvr.kernels.backends.cpu import CpuBackend
from tvr.kernels.backends.torch_dense import DenseTiles
from tvr.kernels.backends.torch_tiles import TorchTiles
from tvr.kernels.checks import INTERACTIONS
from tvr.kernels.losses import row_loss
from tvr.kernels.row_loss.online_softmax import SINGLE_RANK
from tvr.kernels.row_loss.row_loss import LossRule
from tvr.kernels.row_loss.streamed_loss import streamed_loss
from tvr.kernels.similarity import BACKENDS, dmae_similarity

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


def inputs(words: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Pairs of one frame each, with sentences of mask 1 and 2, and padded word slots."""
    arguments = similarity_inputs(21, 21, words, 1, width=24, dtype=dtype)
    arguments["word_mask"][::3, 0] = 2
    return arguments


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("words", [1, 6])
def test_equals_the_reference(
    words: int, interaction: str, neighbours: bool, backend: str, dtype: torch.dtype
) -> None:
    options = {"interaction": interaction, "neighbour_frames": neighbours}
    arguments = inputs(words, dtype)
    expected = scores_and_gradients(reference.dmae_similarity, arguments, **options)
    actual = scores_and_gradients(dmae_similarity, arguments, backend=backend, **options)
    assert_all_close(actual, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_gradients_pass_gradcheck(interaction: str) -> None:
    arguments = {name: x[:3] for name, x in inputs(1).items()}
    features = [arguments[name].clone().requires_grad_() for name in FEATURES]

    def scores(*given: Tensor) -> Tensor:
        named = arguments | dict(zip(FEATURES, given, strict=True))
        return dmae_similarity(**named, interaction=interaction)

    assert torch.autograd.gradcheck(scores, features)


def test_a_feature_without_gradient_gets_none_and_logits_get_zeros() -> None:
    arguments = inputs(1)
    leaves = {n: x.clone().requires_grad_(n in FEATURES[2:]) for n, x in arguments.items()}
    dmae_similarity(**leaves).sum().backward()
    assert leaves["words"].grad is None
    assert leaves["frames"].grad.count_nonzero() > 0
    # Not None: a weight layer takes part in the step, with gradient 0.
    for name in ("word_logits", "frame_logits"):
        assert leaves[name].grad.count_nonzero() == 0


@pytest.fixture
def no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a tile was computed")

    for backend in (CpuBackend, TorchTiles, DenseTiles):
        monkeypatch.setattr(backend, "forward", refuse)
        monkeypatch.setattr(backend, "backward", refuse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("interaction", "words"), [("ti", 6), ("wti", 6), ("att_wti", 1)])
def test_no_tile_is_computed(no_tiles: None, interaction: str, words: int, backend: str) -> None:
    options = {"interaction": interaction, "backend": backend}
    scores_and_gradients(dmae_similarity, inputs(words), **options)


@pytest.mark.parametrize("keep_scores", [False, True])
def test_streamed_loss_takes_the_same_way(no_tiles: None, keep_scores: bool) -> None:
    arguments, rule = inputs(1), LossRule("log", scale=20.0)

    def loss(streamed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {n: x.clone().requires_grad_(n in FEATURES) for n, x in arguments.items()}
        if streamed:
            terms = streamed_loss(**leaves, rule=rule, chunk=3, keep_scores=keep_scores)
        else:
            scores = reference.dmae_similarity(**leaves)
            terms = row_loss(scores, rule, row_offset=0, collectives=SINGLE_RANK)
        terms.loss.backward()
        return terms.loss.detach(), {n: x.grad for n, x in leaves.items() if x.grad is not None}

    (actual, gradients), (expected, expected_gradients) = loss(True), loss(False)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_all_close(gradients, expected_gradients, rtol=1e-10, atol=1e-12)
