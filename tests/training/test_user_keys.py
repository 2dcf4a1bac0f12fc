"""`train.deepspeed`: keys of DeepSpeed's configuration that the user adds to ours."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders.engine_states import CPU, save_engine_state, seeded_model, train_losses
from builders.spawn import spawn
from builders.tiny import tiny_config, with_ranks

from tvr.trainer.cli import show_config
from tvr.trainer.config import Config, TrainConfig, from_json, to_json
from tvr.trainer.distributed.world import World
from tvr.trainer.engine import startup
from tvr.trainer.engine.deepspeed_config import (
    deepspeed_config,
    optimizer_builders,
    optimizer_line,
)
from tvr.trainer.engine.engine import Engine, consolidated_weights, universal_target
from tvr.trainer.engine.startup import COMPILER_OFF, MUON_MODULES

MUON = {"optimizer": {"type": "Muon", "params": {"momentum": 0.95}}}
BF16_STATES = {
    "bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
}


def train(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"steps": 1, "global_batch": 8, "micro_batch": 8} | changes))


def test_keys_are_merged_under_ours_at_every_depth() -> None:
    added = {
        "zero_optimization": {"round_robin_gradients": True},
        "comms_logger": {"enabled": True},
    }
    plain = deepspeed_config(train(zero_stage=2), 1)
    merged = deepspeed_config(train(zero_stage=2, deepspeed=added), 1)
    assert merged.pop("comms_logger") == {"enabled": True}
    assert merged["zero_optimization"].pop("round_robin_gradients") is True
    assert merged == plain


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"gradient_clipping": 2.0}, r"gradient_clipping, which train\.gradient_clip controls"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage, which train\.zero_stage"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled, which train\.precision controls"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled, which train\.precision, which has no fp16"),
        ({"train_batch_size": 32}, r"train_batch_size, which train\.global_batch controls"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, r"train\.accumulation_dtype controls"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            r"offload_optimizer\.device, which train\.offload controls",
        ),
        (
            {"optimizer": {"params": {"lr": 1}}},
            r"optimizer\.params\.lr, which train\.learning_rate",
        ),
        ({"checkpoint": {}}, r"checkpoint, which the section checkpoint controls"),
        ({"zero_allow_untested_optimizer": False}, r"must keep tvr's value: remove it"),
    ],
)
def test_a_key_that_a_setting_controls_is_refused_by_name(
    added: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r"train\.deepspeed sets .*" + message):
        deepspeed_config(train(deepspeed=added), 1)


def test_every_key_of_ours_is_controlled_or_may_be_overridden() -> None:
    free = {"steps_per_print", "wall_clock_breakdown"}
    ours = deepspeed_config(train(zero_stage=2, precision="bf16", offload="optimizer"), 1)
    for key in ours.keys() - free - {"zero_optimization", "bf16"}:
        with pytest.raises(ValueError, match=f"train.deepspeed sets {key}"):
            deepspeed_config(train(deepspeed={key: 1}), 1)
    for section in ("zero_optimization", "bf16"):
        for key in ours[section]:
            with pytest.raises(ValueError, match=f"train.deepspeed sets {section}.{key}"):
                deepspeed_config(train(deepspeed={section: {key: 1}}), 1)


@pytest.mark.parametrize(
    ("name", "offload", "builders"),
    [
        ("Muon", "none", ("FusedAdamBuilder",)),
        ("AdamW", "optimizer", ("FusedAdamBuilder", "CPUAdamBuilder")),
        ("Lion", "none", ("FusedLionBuilder",)),
        ("SGD", "none", ()),
    ],
)
def test_extensions_of_an_optimiser_are_compiled_before_the_ranks_meet(
    name: str, offload: str, builders: tuple[str, ...]
) -> None:
    added = {"optimizer": {"type": name}}
    assert optimizer_builders(train(deepspeed=added, offload=offload, zero_stage=2)) == builders
    assert optimizer_builders(train()) == ()


def test_muon_needs_bf16_sums_in_bf16() -> None:
    with pytest.raises(ValueError, match=r"Muon .* train\.accumulation_dtype=bf16 or"):
        deepspeed_config(train(deepspeed=MUON, zero_stage=2, precision="bf16"), 1)


def test_hugging_faces_auto_is_refused_with_the_reason() -> None:
    added = {"zero_optimization": {"reduce_bucket_size": "auto"}}
    with pytest.raises(ValueError, match=r'reduce_bucket_size to "auto"\. Hugging Face'):
        deepspeed_config(train(deepspeed=added), 1)


def test_flag_and_file_take_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    added = {"zero_optimization": {"reduce_bucket_size": 1000}}
    file = tmp_path / "my.json"
    file.write_text(json.dumps({"train": {"deepspeed": added}}))
    for flags in (["--train.deepspeed", json.dumps(added)], ["--config", str(file)]):
        assert show_config(flags) == 0
        out, err = capsys.readouterr()
        config = from_json(out, where="here")
        assert config.train.deepspeed == added
        (line,) = [line for line in err.splitlines() if line.startswith("DeepSpeed, 1 rank(s): ")]
        shown = json.loads(line.split(": ", 1)[1])
        assert shown == deepspeed_config(config.train, 1)
        assert shown["zero_optimization"]["reduce_bucket_size"] == 1000
    assert show_config(["--train.deepspeed", '{"gradient_clipping": 1}']) == 0
    assert "DeepSpeed: refused: train.deepspeed sets gradient_clipping" in capsys.readouterr().err
    assert from_json(to_json(config), where="again") == config


def settings(data: Path, stage: int, added: dict[str, Any], **changes: Any) -> Config:
    values = {"zero_stage": stage, "learning_rate": 3e-3, "deepspeed": added, **changes}
    return with_ranks(tiny_config(data, train=values), 2)


FORMS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    **{f"Muon at stage {n}": (n, MUON, {}) for n in (1, 2)},
    # DeepSpeed demands it.
    "Muon at stage 3": (3, MUON | {"zero_optimization": {"reduce_scatter": False}}, {}),
    "Muon in bf16": (2, MUON, {"precision": "bf16", "accumulation_dtype": "bf16"}),
    "bf16 states at stage 2": (2, BF16_STATES, {"precision": "bf16"}),
    "bf16 states at stage 3": (3, BF16_STATES, {"precision": "bf16"}),
}


def run_forms(rank: int, world_size: int, data: Path, folder: Path) -> dict[str, Any]:
    """Losses of 4 steps, of the last 2 again after a load, and the dtypes of the states."""
    world = World(rank=rank, world_size=world_size, device=CPU)
    # DeepSpeed would compile Muon's products and a fused Adam for minutes. Muon has its own Adam.
    torch._dynamo.config.disable = True
    with patch.object(startup, "optimizer_builders", lambda train: ()), no_fused_adam():
        return compare_forms(world, data, folder)


@contextmanager
def no_fused_adam() -> Iterator[None]:
    from deepspeed.ops.adam import FusedAdam

    with patch.object(FusedAdam, "__init__", side_effect=RuntimeError("not compiled")):
        yield


def compare_forms(world: World, data: Path, folder: Path) -> dict[str, Any]:
    results = {}
    for name, (stage, added, changes) in FORMS.items():
        config = settings(data, stage, added, **changes)
        engine = Engine(seeded_model(config), config.train, world)
        before = train_losses(engine, config, world, 0, 2)
        save_engine_state(engine, folder / name, world)
        beyond = train_losses(engine, config, world, 2, 2)
        again = Engine(seeded_model(config, seed=1), config.train, world)
        again.load_checkpoint(folder / name / "shards")
        states = [
            (kind, value.dtype)
            for state in engine._optimizer.optimizer.state.values()
            for kind, value in state.items()
            if isinstance(value, torch.Tensor) and value.ndim
        ]
        results[name] = (before, beyond, train_losses(again, config, world, 2, 2), states)
    return results


@pytest.fixture(scope="module")
def forms(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("forms")
    return folder, spawn(run_forms, 2, data, folder, timeout_s=300)[0]


@pytest.mark.parametrize("name", FORMS)
def test_deepspeeds_own_optimisers_train_and_resume(
    forms: tuple[Path, dict[str, Any]], name: str
) -> None:
    folder, results = forms
    before, beyond, again, states = results[name]
    # At stage 3 DeepSpeed resumes Muon to rounding only.
    assert beyond == (pytest.approx(again, rel=1e-6) if name == "Muon at stage 3" else again)
    assert len({*before, *beyond}) == 4
    kinds = {kind for kind, _ in states}
    if "Muon" in name:
        assert {"momentum_buffer", "exp_avg"} <= kinds
    else:
        assert {dtype for _, dtype in states} == {torch.bfloat16}
    weights = consolidated_weights(folder / name / "shards", FORMS[name][0])
    assert all(weight.isfinite().all() for weight in weights.values())


def test_muon_is_compiled_only_where_a_run_may_use_it() -> None:
    before = {name: sys.modules.pop(name, None) for name in MUON_MODULES}
    try:
        startup.import_muon(train())
        plain = importlib.import_module(MUON_MODULES[0]).zeropower_via_newtonschulz5
        assert not hasattr(plain, "_torchdynamo_orig_callable")
        assert COMPILER_OFF not in os.environ
        startup.import_muon(train(deepspeed=MUON))
        compiled = importlib.import_module(MUON_MODULES[0]).zeropower_via_newtonschulz5
        assert hasattr(compiled, "_torchdynamo_orig_callable")
    finally:
        sys.modules.update((name, module) for name, module in before.items() if module)


def test_an_optimiser_of_deepspeed_is_named_and_not_converted(data: Path) -> None:
    config = settings(data, 1, MUON)
    assert optimizer_line(config.train, "cuda") == "optimiser: DeepSpeed's Muon (train.deepspeed)"
    with pytest.raises(ValueError, match="load only on the same number of ranks"):
        universal_target(seeded_model(config), config.train, 2)
