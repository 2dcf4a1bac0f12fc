"""In bf16, the gradient of many small micro-steps equals that of one large step.

Sums of gradients in bf16 lose small terms. They are kept in fp32 by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders.engine_states import CPU, seeded_model
from builders.spawn import spawn
from builders.tiny import tiny_config
from torch import Tensor, nn

from tvr.trainer.config import Config
from tvr.trainer.data import build_tokenizer
from tvr.trainer.distributed.world import World
from tvr.trainer.dry_run.synthetic_step import random_batches
from tvr.trainer.engine.engine import Engine
from tvr.trainer.model.model import model_inputs

PAIRS = 64
STAGES = (1, 2, 3)
IN_BF16 = {"accumulation_dtype": "bf16", "reduction_dtype": "bf16"}


def settings(data: Path, micro_batch: int, **changes: object) -> Config:
    return tiny_config(
        data,
        # No TPM-CL: it selects tokens, and bf16 may select others.
        loss={"tpm_cl": 0},
        train={"global_batch": PAIRS, "micro_batch": micro_batch, **changes},
    )


def gradient(config: Config, batch: Sequence[Tensor], world: World) -> dict[str, Tensor]:
    """The gradient of a mean over the pairs, which does not depend on how they are split."""
    from deepspeed.utils import safe_get_full_grad

    model: nn.Module = seeded_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    engine = Engine(model, config.train, world)  # pyright: ignore[reportArgumentType]
    size = config.train.micro_batch
    per_rank = PAIRS // world.world_size
    for first in range(world.rank * per_rank, (world.rank + 1) * per_rank, size):
        features = engine.encode(*(x[first : first + size] for x in batch))
        # One direction for all pairs, so that their gradients add up.
        loss = features.sentence.float()[:, 0].mean() + features.frames.float()[..., 0].mean()
        engine.backward(loss)
        if first + size < (world.rank + 1) * per_rank:
            engine.step(0.0)
    found = {}
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_grad(parameter)
        if whole is not None:
            found[name] = whole.float().clone()
    return found


def relative_error(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    difference = sum(float((ours[name] - x).square().sum()) for name, x in exact.items())
    return (difference / sum(float(x.square().sum()) for x in exact.values())) ** 0.5


def errors(rank: int, world_size: int, data: Path) -> dict[str, float]:
    """Relative error of each bf16 gradient against fp32, by name."""
    world = World(rank=rank, world_size=world_size, device=CPU)
    config = settings(data, PAIRS // world_size)
    tokenizer = build_tokenizer(config.model, config.data)
    whole = replace(config, train=replace(config.train, micro_batch=PAIRS))
    batch = model_inputs(next(random_batches(whole.data, whole.model, whole.train, tokenizer)), CPU)
    exact = gradient(config, batch, world)
    found = {}
    for stage in STAGES:
        half = {"precision": "bf16", "zero_stage": stage}
        for name, micro_batch, sums in (
            ("one step", PAIRS // world_size, {}),
            ("fp32 sums", 1, {}),
            ("bf16 sums", 1, IN_BF16),
        ):
            config = settings(data, micro_batch, **half, **sums)
            found[f"{name} at stage {stage}"] = relative_error(
                gradient(config, batch, world), exact
            )
    return found


@pytest.fixture(scope="module")
def errors_of_two_ranks(data: Path) -> dict[str, float]:
    found = spawn(errors, 2, data, timeout_s=300)
    assert found[0] == found[1]
    print({name: f"{value:.2e}" for name, value in found[0].items()})
    return found[0]


@pytest.mark.parametrize("stage", STAGES)
def test_micro_steps_in_bf16_add_no_error(
    errors_of_two_ranks: dict[str, float], stage: int
) -> None:
    one, fp32, bf16 = (
        errors_of_two_ranks[f"{name} at stage {stage}"]
        for name in ("one step", "fp32 sums", "bf16 sums")
    )
    assert 0 < fp32 < 1.2 * one
    # What DeepSpeed does if nothing is set. Measured: 1.9 times at stage 1, 2.7 at 2 and 3.
    assert bf16 > 1.5 * fp32
