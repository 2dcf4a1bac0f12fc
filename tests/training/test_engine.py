"""DeepSpeed's configuration, and the engine's checks before DeepSpeed starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.tiny import tiny_config
from builders.worlds import SINGLE_RANK
from torch import nn
from torch.utils.cpp_extension import _get_build_directory

from tvr.trainer.config import TrainConfig, to_json
from tvr.trainer.engine import engine as engine_module
from tvr.trainer.engine.deepspeed_config import (
    OVERLAP_BUCKET,
    deepspeed_config,
    is_fused,
    optimizer_line,
    state_layout,
)
from tvr.trainer.engine.engine import Engine
from tvr.trainer.engine.universal import holds_weights


def train(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"steps": 1, "global_batch": 48, "micro_batch": 8} | changes))


@pytest.mark.parametrize("clip", [0.0, 1.0, 0.3])
def test_clipping_is_always_set(clip: float) -> None:
    # DeepSpeed clips at 1.0 if the key is missing.
    assert deepspeed_config(train(gradient_clip=clip), 1)["gradient_clipping"] == clip


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_zero_stage_and_linear_layers(zero_stage: int) -> None:
    zero = deepspeed_config(train(zero_stage=zero_stage), 1)["zero_optimization"]
    assert zero["stage"] == zero_stage
    assert zero["memory_efficient_linear"] is False


def test_batch_sizes_are_per_rank() -> None:
    for world_size, accumulation in ((1, 6), (2, 3), (6, 1)):
        got = deepspeed_config(train(), world_size)
        assert got["train_micro_batch_size_per_gpu"] == 8
        assert got["gradient_accumulation_steps"] == accumulation
        # DeepSpeed derives the train batch size; giving it too could only contradict it.
        assert "train_batch_size" not in got
    with pytest.raises(ValueError, match="global_batch=48 must be a multiple"):
        deepspeed_config(train(), 4)


def test_precision() -> None:
    whole = deepspeed_config(train(), 1)
    assert whole["bf16"] == {"enabled": False}
    assert "data_types" not in whole
    assert "communication_data_type" not in whole
    for zero_stage in (1, 2, 3):
        half = deepspeed_config(train(precision="bf16", zero_stage=zero_stage), 1)
        assert half["bf16"] == {"enabled": True, "immediate_grad_update": zero_stage == 1}
    with pytest.raises(ValueError, match=r"train\.precision=bf16 needs train\.zero_stage >= 1"):
        deepspeed_config(train(precision="bf16", zero_stage=0), 1)


def test_bf16_gradients_are_summed_in_fp32_unless_set() -> None:
    # DeepSpeed's default is the model's precision.
    default = deepspeed_config(train(precision="bf16"), 1)
    assert default["data_types"] == {"grad_accum_dtype": "fp32"}
    assert default["communication_data_type"] == "fp32"
    changes = {"accumulation_dtype": "bf16", "reduction_dtype": "bf16"}
    half = deepspeed_config(train(precision="bf16", **changes), 1)
    assert half["data_types"] == {"grad_accum_dtype": "bf16"}
    assert half["communication_data_type"] == "bf16"
    for name in changes:
        message = rf"train\.{name}=bf16 needs train\.precision=bf16; it is fp32"
        with pytest.raises(ValueError, match=message):
            deepspeed_config(train(**{name: "bf16"}), 1)


def test_states_of_another_layout_are_not_loaded_directly() -> None:
    layouts = [
        state_layout(train(**changes))
        for changes in (
            {},
            {"precision": "bf16"},
            {"precision": "bf16", "accumulation_dtype": "bf16"},
            {"precision": "bf16", "offload": "optimizer"},
            {"precision": "bf16", "zero_stage": 2},
        )
    ]
    # DeepSpeed takes another optimiser class in the second case only.
    assert layouts == ["fp32", "bf16 with fp32 gradients", "bf16", "bf16", "bf16"]
    # The float32 weights of every bf16 layout lie in the optimiser's files.
    file = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    assert [holds_weights(file, 1, name) for name in layouts] == [False, True, True, True, True]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_offload_names_the_state_in_host_memory(zero_stage: int) -> None:
    host = {"device": "cpu", "pin_memory": True}
    settings = train(zero_stage=zero_stage, offload="optimizer")
    zero = deepspeed_config(settings, 1, on_gpu=True)["zero_optimization"]
    assert zero["offload_optimizer"] == host
    assert "offload_param" not in zero
    whole = train(zero_stage=3, offload="parameters")
    zero = deepspeed_config(whole, 1, on_gpu=True)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == host
    plain = deepspeed_config(train(zero_stage=zero_stage), 1)["zero_optimization"]
    assert not [name for name in plain if name.startswith("offload")]


def test_gradients_are_summed_beside_the_backward_where_that_is_safe() -> None:
    def zero(on_gpu: bool, **changes: Any) -> dict[str, Any]:
        return deepspeed_config(train(**changes), 1, on_gpu=on_gpu)["zero_optimization"]

    for stage in (2, 3):
        assert zero(True, zero_stage=stage)["overlap_comm"] is True
        # A bucket as large as DeepSpeed's default would hold a whole model until the end.
        assert zero(True, zero_stage=stage)["reduce_bucket_size"] == OVERLAP_BUCKET
        assert "overlap_comm" not in zero(False, zero_stage=stage)
        assert "overlap_comm" not in zero(True, zero_stage=stage, offload="optimizer")
        assert zero(True, zero_stage=stage, overlap_comm=False)["overlap_comm"] is False
    assert "overlap_comm" not in zero(True, zero_stage=1)


def test_deepspeed_keeps_torchs_optimiser() -> None:
    got = deepspeed_config(train(offload="optimizer"), 1)
    assert got["zero_allow_untested_optimizer"] is True
    assert got["zero_force_ds_cpu_optimizer"] is False
    assert "optimizer" not in got


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload": "optimizer", "zero_stage": 0}, r"optimizer needs .*1 or 2 or 3.*it is 0"),
        (
            {"offload": "parameters", "zero_stage": 2},
            r"parameters needs train\.zero_stage 3,.*is 2",
        ),
        ({"compile": True, "zero_stage": 3}, r"train\.compile=true does not work at .*=3"),
    ],
)
def test_unsupported_settings_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deepspeed_config(train(**changes), 1)


def test_the_fused_optimiser_is_used_if_a_gpu_holds_its_state() -> None:
    assert is_fused(train(), "cuda")
    assert not is_fused(train(), "cpu")
    assert not is_fused(train(offload="optimizer"), "cuda")
    assert optimizer_line(train(), "cuda") == "optimiser: torch AdamW, fused"
    assert optimizer_line(train(), "cpu") == (
        "optimiser: torch AdamW, plain (on a CPU the fused one rounds differently)"
    )
    assert "train.offload=optimizer keeps" in optimizer_line(train(offload="optimizer"), "cuda")


def test_on_a_cpu_the_fused_optimiser_rounds_differently() -> None:
    # If this fails, the fused optimiser can be used everywhere.
    torch.manual_seed(0)
    start, gradients = torch.randn(100_000), torch.randn(10, 100_000)
    ends = []
    for fused in (False, True):
        parameter = nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=fused)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach())
    assert not torch.equal(*ends)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_a_scalar_parameter_is_refused_before_deepspeed_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class WithScale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(2, 2)
            self.logit_scale = nn.Parameter(torch.tensor(4.6))

    # The engine must not use DeepSpeed yet: an object() has neither comm nor initialize.
    monkeypatch.setattr(engine_module, "_import_deepspeed", lambda world: object())
    model: Any = WithScale()
    with pytest.raises(ValueError, match=r"logit_scale has no dimension.*shape \(1,\)"):
        Engine(model, train(), SINGLE_RANK)


def test_deepspeed_starts_without_mlflow_and_leaves_it_importable() -> None:
    code = """
import sys
from tvr.trainer.engine.engine import _import_deepspeed
_import_deepspeed(None)
print([name for name in sys.modules if name.split(".")[0] == "mlflow"])
import mlflow
print(mlflow.__name__)
"""
    line = [sys.executable, "-c", code]
    result = subprocess.run(line, capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.split("\n") == ["[]", "mlflow", ""]


def test_a_stale_build_lock_blocks_no_start(data: Path, tmp_path: Path) -> None:
    """Builds DeepSpeed's extension beside the lock that torch leaves when a builder is killed."""
    lock = Path(_get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
    settings = tmp_path / "settings.json"
    settings.write_text(to_json(tiny_config(data)))
    line = ["train", "--dry-run", "--config", str(settings), "--run-dir", str(tmp_path / "run")]
    lock.touch()
    try:
        subprocess.run(
            [sys.executable, "-m", "tvr.launchers.cli", *line],
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=120,
        )
        assert not lock.exists()
    finally:
        lock.unlink(missing_ok=True)
