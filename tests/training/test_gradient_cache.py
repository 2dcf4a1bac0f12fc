"""Gradient caching gives the gradient of the whole batch, with dropout too, in bounded memory."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from builders import plain_model as plain
from builders.plain_model import (
    CAPTION_IDS,
    PAIRS,
    VIDEO_IDS,
    Gradients,
    PlainModel,
    plain_batch,
    plain_model,
)
from torch import Tensor

from tvr.trainer.config import LossConfig, ModelConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.loss.gradient_cache import FeatureCache, concat_features
from tvr.trainer.loss.objective import objective
from tvr.trainer.model.model import Features

CPU = torch.device("cpu")
SINGLE_RANK = World(rank=0, world_size=1, device=CPU)


def loss_of(features: Features) -> Tensor:
    found = objective(
        features, VIDEO_IDS, ModelConfig(), LossConfig(), SINGLE_RANK, caption_ids=CAPTION_IDS
    )
    return found.for_backward


def cached(model: PlainModel, sizes: Sequence[int], dtype: torch.dtype) -> Gradients:
    cache = FeatureCache(model, plain.split(plain_batch(dtype), sizes), CPU)
    loss_of(cache.features).backward()
    cache.replay(lambda part: part.backward())
    return plain.gradients_of(model)


def uncached(model: PlainModel, sizes: Sequence[int], dtype: torch.dtype) -> Gradients:
    loss_of(
        concat_features([model(part) for part in plain.split(plain_batch(dtype), sizes)])
    ).backward()
    return plain.gradients_of(model)


@pytest.mark.parametrize("sizes", [(PAIRS,), (1, 13), (5, 3, 4, 2), (1,) * PAIRS], ids=str)
def test_the_gradient_equals_the_gradient_of_the_whole_batch(sizes: tuple[int, ...]) -> None:
    whole = uncached(plain_model(torch.float64), (PAIRS,), torch.float64)
    ours = cached(plain_model(torch.float64), sizes, torch.float64)
    plain.assert_close(ours, whole, relative=1e-12)


def test_both_encodings_draw_the_same_dropout() -> None:
    sizes, dtype = (5, 3, 4, 2), torch.float64
    torch.manual_seed(1)
    theirs = uncached(plain_model_seeded(dtype), sizes, dtype)
    afterwards = torch.rand(3)
    torch.manual_seed(1)
    ours = cached(plain_model_seeded(dtype), sizes, dtype)
    # Both runs drew the same numbers, and the replay restored the random state.
    assert torch.equal(torch.rand(3), afterwards)
    plain.assert_close(ours, theirs, relative=1e-12)
    torch.manual_seed(2)
    other = cached(plain_model_seeded(dtype), sizes, dtype)
    with pytest.raises(AssertionError):
        plain.assert_close(other, theirs, relative=1e-2)


def plain_model_seeded(dtype: torch.dtype) -> PlainModel:
    """Builds the model with dropout, and keeps the random state."""
    with torch.random.fork_rng():
        return plain_model(dtype, dropout=0.3)


def test_the_replay_restores_the_random_state() -> None:
    model = plain_model(torch.float32, dropout=0.3)
    cache = FeatureCache(model, plain.split(plain_batch(torch.float32), (7, 7)), CPU)
    loss_of(cache.features).backward()
    torch.rand(5)  # a loss may draw random numbers
    state = torch.get_rng_state()
    cache.replay(lambda part: part.backward())
    assert torch.equal(torch.get_rng_state(), state)


def test_activations_of_one_micro_batch_at_a_time_are_kept() -> None:
    num_kept: list[int] = []
    activations: list[weakref.ref[Tensor]] = []

    def encode(batch: tuple[Tensor, ...]) -> Features:
        num_kept.append(sum(reference() is not None for reference in activations))
        features = model(batch)
        # Only autograd keeps this tensor.
        hidden = features.words * 2
        activations.append(weakref.ref(hidden))
        return features._replace(words=hidden.sin())

    model = plain_model(torch.float32)
    cache = FeatureCache(encode, plain.split(plain_batch(torch.float32), (5, 5, 4)), CPU)
    assert num_kept == [0, 0, 0]
    assert all(x is None or x.grad_fn is None for x in cache.features)
    loss_of(cache.features).backward()
    num_kept_in_backward = []

    def backward(part: Tensor) -> None:
        num_kept_in_backward.append(sum(reference() is not None for reference in activations))
        part.backward()

    cache.replay(backward)
    assert num_kept == [0] * 6
    assert num_kept_in_backward == [1, 1, 1]


def test_gradients_have_the_dtype_of_the_features() -> None:
    def encode(batch: tuple[Tensor, ...]) -> Features:
        found = model(batch)
        return found._replace(frames=found.frames.bfloat16(), words=found.words.bfloat16())

    model = plain_model(torch.float32)
    parts = plain.split(plain_batch(torch.float32), (5, 9))
    loss_of(concat_features([encode(part) for part in parts])).backward()
    theirs = plain.gradients_of(model)
    model = plain_model(torch.float32)
    cache = FeatureCache(encode, parts, CPU)
    loss_of(cache.features).backward()
    for name in ("frames", "words", "sentence", "margin_hinge"):
        feature = getattr(cache.features, name)
        assert feature.grad.dtype == feature.dtype
    assert cache.features.frames.dtype == torch.bfloat16
    # Rounded to bfloat16, a multiplication by 41 and the division by it would change the gradient.
    cache.replay(lambda part: (part * 41 / 41).backward())
    plain.assert_close(plain.gradients_of(model), theirs, relative=1e-5)


def test_replay_without_micro_batches_or_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="no micro-batches"):
        FeatureCache(plain_model(torch.float32), [], CPU)
    cache = FeatureCache(plain_model(torch.float32), [plain_batch(torch.float32)], CPU)
    with pytest.raises(ValueError, match="call the loss's backward first"):
        cache.replay(lambda part: part.backward())


@pytest.mark.gpu
def test_both_encodings_draw_the_same_dropout_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    batches = [
        tuple(x.to(device) for x in part)
        for part in plain.split(plain_batch(torch.float32), (5, 9))
    ]
    world = replace(SINGLE_RANK, device=device)

    def run(with_cache: bool) -> Gradients:
        model = plain_model(torch.float32, dropout=0.3).to(device)
        torch.manual_seed(1)
        cache = FeatureCache(model, batches, device) if with_cache else None
        features = cache.features if cache else concat_features([model(part) for part in batches])
        ids = VIDEO_IDS.to(device)
        objective(features, ids, ModelConfig(), LossConfig(), world).for_backward.backward()
        if cache:
            cache.replay(lambda part: part.backward())
        return plain.gradients_of(model)

    plain.assert_close(run(True), run(False), relative=1e-4)
