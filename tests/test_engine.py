"""DeepSpeed's dictionary, and the models that it is not given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tvr.trainer import engine as engine_module
from tvr.trainer.config import TrainConfig
from tvr.trainer.engine import Engine, deepspeed_config
from tvr.trainer.world import World

ALONE = World(rank=0, world_size=1, device=torch.device("cpu"))


def train(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"steps": 1, "global_batch": 48, "micro_batch": 8} | changes))


@pytest.mark.parametrize("clip", [0.0, 1.0, 0.3])
def test_clipping_is_always_said(clip: float) -> None:
    # Left out, DeepSpeed clips at 1.0.
    assert deepspeed_config(train(gradient_clip=clip), 1)["gradient_clipping"] == clip


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_stage_and_its_linear(zero_stage: int) -> None:
    zero = deepspeed_config(train(zero_stage=zero_stage), 1)["zero_optimization"]
    assert zero["stage"] == zero_stage
    assert zero["memory_efficient_linear"] is False


def test_batch_sizes_are_those_of_each_rank() -> None:
    for world_size, accumulation in ((1, 6), (2, 3), (6, 1)):
        got = deepspeed_config(train(), world_size)
        assert got["train_micro_batch_size_per_gpu"] == 8
        assert got["gradient_accumulation_steps"] == accumulation
        # DeepSpeed derives it; given too, it could only disagree.
        assert "train_batch_size" not in got
    with pytest.raises(ValueError, match="global_batch=48 must be a multiple"):
        deepspeed_config(train(), 4)


def test_precision() -> None:
    assert deepspeed_config(train(), 1)["bf16"] == {"enabled": False}
    for zero_stage in (1, 2, 3):
        half = deepspeed_config(train(precision="bf16", zero_stage=zero_stage), 1)
        assert half["bf16"] == {"enabled": True}
    with pytest.raises(ValueError, match=r"train\.precision=bf16 needs train\.zero_stage >= 1"):
        deepspeed_config(train(precision="bf16", zero_stage=0), 1)


def test_a_parameter_without_dimension_is_refused_before_deepspeed_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class WithScale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(2, 2)
            self.logit_scale = nn.Parameter(torch.tensor(4.6))

    # Nothing of DeepSpeed may be touched: an object() has neither comm nor initialize.
    monkeypatch.setattr(engine_module, "_import_deepspeed", lambda world: object())
    model: Any = WithScale()
    with pytest.raises(ValueError, match=r"logit_scale has no dimension.*shape \(1,\)"):
        Engine(model, train(), ALONE)
