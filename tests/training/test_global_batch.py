"""Loss and all gradients of 2 ranks x B equal those of 1 rank x 2B, at every ZeRO stage."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders.gradients import Gradients, assert_equal_gradients
from builders.spawn import spawn
from builders.tiny import tiny_config, with_ranks
from builders.worlds import world_of
from torch import Tensor

from tvr.trainer.config import Config
from tvr.trainer.data import training_batches
from tvr.trainer.distributed.collectives import all_gather_rows, loss_collectives
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.engine import Engine
from tvr.trainer.loss.objective import objective
from tvr.trainer.model.model import TextVideoModel, build_model, model_inputs
from tvr.trainer.model.tokenizer import Tokenizer, load_tokenizer

LOSSES = {
    "reference": {"similarity": "neg_nce", "neg_nce_mode": "reference"},
    "log": {"similarity": "neg_nce", "neg_nce_mode": "log"},
    "set": {"similarity": "neg_nce", "neg_nce_mode": "set"},
    "info_nce": {"similarity": "info_nce"},
}
ENGINE_CASES = [(zero_stage, name) for zero_stage in range(4) for name in ("reference", "log")]
# ZeRO-3 releases parameters above this size between uses, and keeps smaller ones.
RELEASED_SIZE = 100_000
DOUBLE_CASES = [(loss, interaction) for loss in LOSSES for interaction in ("att_wti", "ti")]


def model_of(config: Config) -> tuple[TextVideoModel, Tokenizer]:
    tokenizer = load_tokenizer(str(config.model.tokenizer), config.data.max_words)
    torch.manual_seed(3)
    model = build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)
    return model, tokenizer


def engine_gradients(
    rank: int, world_size: int, folder: Path
) -> dict[tuple[int, str], tuple[float, Gradients]]:
    """Returns loss and whole gradients by (ZeRO stage, loss), in one slow start of the ranks."""
    from deepspeed.utils import safe_get_full_grad

    world = world_of(rank, world_size)
    results = {}
    for zero_stage, name in ENGINE_CASES:
        config = tiny_config(
            folder,
            loss=LOSSES[name],
            model={"towers": {"width": 192 if zero_stage == 3 else 32}},
            train={"zero_stage": zero_stage},
        )
        config = with_ranks(config, world_size)
        model, tokenizer = model_of(config)
        engine = Engine(model, config.train, world)
        batch = next(training_batches(config.data, config.model, config.train, tokenizer, world))
        features = engine.encode(*model_inputs(batch, world.device))
        mine = objective(
            features,
            batch.video_ids,
            config.model,
            config.loss,
            world,
            caption_ids=batch.caption_ids,
        )
        shares = loss_collectives(world).sum(mine.shares)
        engine.backward(mine.for_backward)
        results[zero_stage, name] = (
            float(shares[0]),
            {
                key: safe_get_full_grad(parameter).clone()
                for key, parameter in engine.module.named_parameters()
            },
        )
    return results


@pytest.fixture(scope="module")
def by_engine(data: Path) -> list[dict[tuple[int, str], tuple[float, Gradients]]]:
    """Results of a single rank, followed by those of each of two ranks."""
    alone = spawn(engine_gradients, 1, data, timeout_s=300)
    return alone + spawn(engine_gradients, 2, data, timeout_s=300)


@pytest.mark.parametrize(("zero_stage", "name"), ENGINE_CASES)
def test_two_ranks_equal_one_at_every_zero_stage(
    by_engine: list[dict[tuple[int, str], tuple[float, Gradients]]], zero_stage: int, name: str
) -> None:
    (loss, gradients), *two = (results[zero_stage, name] for results in by_engine)
    assert (max(g.numel() for g in gradients.values()) > RELEASED_SIZE) == (zero_stage == 3)
    # The frame predictor of TPM-CL gets no gradient, as published; every other parameter does.
    without_gradient = {key for key, gradient in gradients.items() if not gradient.any()}
    # A bias before a softmax has a gradient of rounding errors, which may all be 0.
    without_gradient -= {key for key in gradients if key.endswith("_weight.layers.0.bias")}
    assert without_gradient == {key for key in gradients if key.startswith("frame_predictor.")}
    for ranks_loss, ranks_gradients in two:
        assert ranks_loss == pytest.approx(loss, rel=1e-5)
        assert_equal_gradients(ranks_gradients, gradients, relative=1e-5)


def double_gradients(
    rank: int, world_size: int, folder: Path
) -> dict[tuple[str, str], tuple[float, Gradients]]:
    """Averages gradients over ranks in float64, without DeepSpeed."""
    world = world_of(rank, world_size)
    results = {}
    for loss, interaction in DOUBLE_CASES:
        config = tiny_config(
            folder,
            loss=LOSSES[loss],
            model={"interaction": interaction},
            train={"global_batch": 6},
        )
        config = with_ranks(config, world_size)
        model, tokenizer = model_of(config)
        model.double()
        batch = next(training_batches(config.data, config.model, config.train, tokenizer, world))
        features = model(*model_inputs(batch, world.device))
        mine = objective(
            features,
            batch.video_ids,
            config.model,
            config.loss,
            world,
            caption_ids=batch.caption_ids,
        )
        mine.for_backward.backward()
        gradients = {}
        for key, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[key] = loss_collectives(world).sum(gradient) / world_size
        value = float(loss_collectives(world).sum(mine.shares)[0])
        results[loss, interaction] = (value, gradients)
    return results


@pytest.mark.skipif(
    transformers.__version__ < "5", reason="CLIP of transformers 4 cannot run in float64"
)
def test_any_number_of_ranks_is_exact_in_double(data: Path) -> None:
    alone = double_gradients(0, 1, data)
    for world_size in (2, 3):
        for results in spawn(double_gradients, world_size, data):
            for case in DOUBLE_CASES:
                assert results[case][0] == pytest.approx(alone[case][0], rel=1e-12)
                assert_equal_gradients(results[case][1], alone[case][1], relative=1e-9)


Gathered = tuple[Tensor, Tensor]


def gather_backward(rank: int, world_size: int) -> tuple[dict[str, Gathered], list[Any]]:
    world, results = world_of(rank, world_size), {}
    for name, count in (("equal", 2), ("unequal", rank)):
        counts = world.all_gather_counts(count)
        assert counts == ((2, 2, 2) if name == "equal" else (0, 1, 2))
        mine = torch.full((count, 3), float(rank + 1), dtype=torch.float64, requires_grad=True)
        everyone = all_gather_rows(mine, world, counts)
        weights = torch.arange(everyone.numel(), dtype=torch.float64).view_as(everyone)
        (everyone * weights * (rank + 1)).sum().backward()
        assert mine.grad is not None
        results[name] = everyone.detach(), mine.grad
    nothing = all_gather_rows(torch.zeros(0, 4), world, (0, 0, 0))
    assert nothing.shape == (0, 4)
    return results, [run_failing(world, failing_ranks) for failing_ranks in ((), (2,), (1, 2))]


def run_failing(world: World, failing_ranks: tuple[int, ...]) -> Any:
    def action() -> int:
        if world.rank in failing_ranks:
            raise KeyError(world.rank)
        return 10 * world.rank

    try:
        return world.run_on_all(action, KeyError)
    except KeyError as error:
        return error.args


@pytest.fixture(scope="module")
def gathered() -> list[tuple[dict[str, Gathered], list[Any]]]:
    return spawn(gather_backward, 3)


@pytest.mark.parametrize(("name", "counts"), [("equal", (2, 2, 2)), ("unequal", (0, 1, 2))])
def test_all_gather_sums_the_gradients_of_all_ranks_on_the_owner(
    gathered: list[tuple[dict[str, Gathered], list[Any]]], name: str, counts: tuple[int, ...]
) -> None:
    owners = [rank + 1 for rank, count in enumerate(counts) for _ in range(count)]
    weights = torch.arange(3 * sum(counts), dtype=torch.float64).view(-1, 3) * (1 + 2 + 3)
    for (results, _), expected in zip(gathered, weights.split(list(counts)), strict=True):
        everyone, gradient = results[name]
        assert everyone.tolist() == [[owner] * 3 for owner in owners]
        assert torch.equal(gradient, expected)


def test_an_error_on_some_ranks_is_raised_on_all_as_that_of_the_lowest_rank(
    gathered: list[tuple[dict[str, Gathered], list[Any]]],
) -> None:
    for rank, (_, outcomes) in enumerate(gathered):
        assert outcomes == [10 * rank, (2,), (1,)]


def test_the_tiny_configuration_refuses_unknown_settings(data: Path) -> None:
    with pytest.raises(ValueError, match=r"loss\.margn"):
        tiny_config(data, loss={"margn": 1})
    assert asdict(tiny_config(data))["train"]["global_batch"] == 8
