"""At ZeRO-3 a rank never holds the whole model, and the weights are those of a plain build."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders.engine_states import CPU, seeded_model
from builders.pretrained import save_clip
from builders.spawn import spawn
from builders.tiny import IMAGE_SIZE, tiny_config
from torch import nn

from tvr.trainer.build_run import build_run
from tvr.trainer.config import Config
from tvr.trainer.data import build_tokenizer
from tvr.trainer.distributed.world import World
from tvr.trainer.fencing import begin_attempt
from tvr.trainer.monitoring.run_log import LogWriter

CASES: dict[str, dict[str, Any]] = {
    "from scratch": {},
    "bf16": {"train": {"precision": "bf16"}},
    "frozen": {"model": {"freeze": 1}},
    "pretrained": {"model": {"pretrained": "clip"}},
}


def settings(data: Path, folder: Path, case: str) -> Config:
    changes = CASES[case]
    model = {"towers": {"width": 64, "layers": 2}, **changes.get("model", {})}
    if "pretrained" in model:
        model["pretrained"] = str(folder / "clip")
    train = {"zero_stage": 3, "micro_batch": 4, **changes.get("train", {})}
    return tiny_config(data, model=model, train=train)


def held_bytes(model: nn.Module) -> int:
    """Memory of the parameters that are not partitioned yet."""
    storages = {s.data_ptr(): s for p in model.parameters() for s in [p.untyped_storage()]}
    return sum(storage.nbytes() for storage in storages.values())


def build_all(rank: int, world_size: int, data: Path, folder: Path) -> dict[str, Any]:
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import safe_get_full_fp32_param

    world, results = World(rank=rank, world_size=world_size, device=CPU), {}
    convert = Init._zero_init_param
    for case in CASES:
        config = settings(data, folder, case)
        models: list[nn.Module] = []
        held: list[int] = []

        def note(init: Any, parameter: Any, models: Any = models, held: Any = held) -> None:
            held.append(held_bytes(models[0]))
            convert(init, parameter)

        attempt = world.run_on_first(lambda: begin_attempt(folder / "run"))
        with patch.object(Init, "_zero_init_param", note):
            run = build_run(
                config,
                folder / "run",
                world,
                attempt=attempt,
                log=LogWriter(folder / "run", attempt, world),
                tokenizer=build_tokenizer(config.model, config.data),
                num_samples={"": 48},
                inspect_model=models.append,
            )
        expected = seeded_model(config, config.train.seed)
        half = config.train.precision == "bf16"
        same = {}
        for name, parameter in run.engine.module.named_parameters():
            value = dict(expected.named_parameters())[name].detach()
            if parameter.requires_grad:
                found = safe_get_full_fp32_param(parameter)
            else:
                import deepspeed

                with deepspeed.zero.GatheredParameters([parameter]):
                    found = parameter.detach().clone().float()
            same[name] = torch.equal(found, value.bfloat16().float() if half else value)
        buffers = dict(run.engine.module.named_buffers())
        for name, value in expected.named_buffers():
            same[name] = torch.equal(buffers[name].float(), value.float())
        sizes = [p.numel() * 4 for p in expected.parameters()]
        results[case] = {
            "peak": max(held),
            "steps": len(held),
            "largest": max(sizes),
            "whole": sum(sizes),
            "parameters": len(sizes),
            "different": [name for name, is_same in same.items() if not is_same],
        }
    return results


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("built")
    (folder / "run").mkdir()
    config = tiny_config(data)
    tokenizer = build_tokenizer(config.model, config.data)
    save_clip(folder / "clip", tokenizer, width=16, image_size=IMAGE_SIZE)
    return spawn(build_all, 2, data, folder, timeout_s=300)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_a_plain_build(built: list[dict[str, Any]], case: str) -> None:
    for results in built:
        assert results[case]["steps"] == results[case]["parameters"]
        assert results[case]["different"] == []


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_one_whole_parameter_at_a_time(built: list[dict[str, Any]], case: str) -> None:
    found = built[1][case]
    assert found["whole"] > 3 * found["largest"]
    # One parameter, and one number for each that is not yet there.
    assert found["peak"] <= found["largest"] + 4 * found["parameters"]
