"""Every ZeRO stage, with offload or activation checkpointing, equals torch's AdamW bit for bit.

Compiled towers agree to rounding.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from builders.engine_states import CPU, save_engine_state, seeded_model, train_losses
from builders.exhaustive import everything, principal_and_further
from builders.spawn import spawn
from builders.tiny import tiny_config, with_ranks
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tvr.trainer.config import Config, TrainConfig
from tvr.trainer.data import training_batches
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.engine import Engine
from tvr.trainer.engine.tower_layers import COMPILE_CACHE_VARIABLE, explain_compile_cache_errors
from tvr.trainer.errors import TrainingFailed
from tvr.trainer.model.model import model_inputs
from tvr.trainer.model.parameter_groups import parameter_groups
from tvr.trainer.model.tokenizer import load_tokenizer

STEPS, MORE = 2, 1
RECOMPUTED = {"activation_checkpointing": True}
OPTIMIZER = {"offload": "optimizer"}
PARAMETERS = {"offload": "parameters"}
BF16 = {"precision": "bf16"}
SAVED_FORMS = ({}, OPTIMIZER, PARAMETERS, BF16)
ALL_FORMS = [
    *((stage, {}) for stage in (0, 1, 2, 3)),
    *((stage, RECOMPUTED) for stage in (0, 1, 2, 3)),
    *((stage, OPTIMIZER) for stage in (1, 2, 3)),
    (3, PARAMETERS),
]
# Without TVR_CI=1: each stage, and each form at one stage.
PRINCIPAL = [*((stage, {}) for stage in (0, 1, 2, 3)), (3, RECOMPUTED), (1, OPTIMIZER)]
PRINCIPAL += [(3, PARAMETERS)]
FORMS = ALL_FORMS if everything() else PRINCIPAL
ALL_MOVES = [
    (1, {}, OPTIMIZER),
    (1, OPTIMIZER, {}),
    (2, {}, OPTIMIZER),
    (2, OPTIMIZER, {}),
    (3, {}, PARAMETERS),
    (3, OPTIMIZER, {}),
    (3, PARAMETERS, PARAMETERS),
    *((stage, BF16, BF16) for stage in (1, 2, 3)),
]
MOVES = ALL_MOVES if everything() else [(1, {}, OPTIMIZER), (3, {}, PARAMETERS), (1, BF16, BF16)]
# The second one combines all that wraps a tower.
ALL_COMPILED = [(0, {"compile": True}), (1, {"compile": True} | OPTIMIZER | RECOMPUTED)]
COMPILED = ALL_COMPILED if everything() else ALL_COMPILED[1:]
StepResults = tuple[list[float], dict[str, Tensor]]


def settings(data: Path, stage: int, world_size: int, **form: Any) -> Config:
    # No clipping: each stage sums the norm in another order.
    changes = {"zero_stage": stage, "learning_rate": 3e-3, "weight_decay": 0.5, "gradient_clip": 0}
    config = tiny_config(data, model={"towers": {"layers": 2}}, train=changes | form)
    return with_ranks(config, world_size)


def weights(engine: Any, zero_stage: int) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param if zero_stage else Tensor.detach
    return {name: whole(p).clone() for name, p in engine.module.named_parameters()}


class PlainEngine:
    """The engine's interface in plain torch: averages gradients over ranks and runs AdamW."""

    def __init__(self, model: Any, config: Config, world: World) -> None:
        train, self.module, self._world = config.train, model, world
        groups = parameter_groups(model, train)
        self._optimizer = torch.optim.AdamW(groups, betas=(train.beta1, train.beta2))

    def encode(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, factor: float) -> None:
        for parameter in self.module.parameters():
            if parameter.grad is None:  # the frame-weight predictor, which decays all the same
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self._world.world_size
        self._optimizer.step()
        self._optimizer.zero_grad()


def run_steps(
    engine: Any, config: Config, world: World, first: int = 0, count: int = STEPS
) -> StepResults:
    values = train_losses(engine, config, world, first, count)
    return values, weights(engine, config.train.zero_stage)


def run_all_forms(rank: int, world_size: int, data: Path, folder: Path) -> dict[str, Any]:
    """Runs each form; returns losses and weights by stage and settings, plain torch as "plain"."""
    world, results = World(rank=rank, world_size=world_size, device=CPU), {}
    config = settings(data, 0, world_size)
    results["plain"] = run_steps(PlainEngine(seeded_model(config), config, world), config, world)
    for stage, form in [*FORMS, *bf16_forms()]:
        config = settings(data, stage, world_size, **form)
        engine = Engine(seeded_model(config), config.train, world)
        results[key(stage, form)] = run_steps(engine, config, world)
        if form in SAVED_FORMS:
            save_engine_state(engine, folder / key(stage, form), world)
            copied = tensors(engine.state_dict())
            live = tensors(engine.state_dict(copy=False))
            snapshot = [tensor.clone() for tensor in live]
            results[f"beyond {key(stage, form)}"] = run_steps(engine, config, world, STEPS, MORE)
            results[f"copy {key(stage, form)}"] = [equal(copied, snapshot), equal(live, snapshot)]
    results |= continue_moved(data, folder, world)
    return results


def continue_moved(data: Path, folder: Path, world: World) -> dict[str, StepResults]:
    """Continues states that another form of the same stage has saved."""
    results = {}
    for stage, saved_form, form in MOVES:
        config = settings(data, stage, world.world_size, **form)
        engine = Engine(seeded_model(config), config.train, world)
        engine.load_checkpoint(folder / key(stage, saved_form) / "shards")
        results[f"{key(stage, saved_form)} -> {form}"] = run_steps(
            engine, config, world, STEPS, MORE
        )
    return results


def tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def bf16_forms() -> list[tuple[int, dict[str, Any]]]:
    forms = [
        *((stage, {}) for stage in (1, 2, 3)),
        (2, RECOMPUTED),
        (2, OPTIMIZER),
        (3, PARAMETERS | RECOMPUTED),
    ]
    every = [(stage, BF16 | form) for stage, form in forms]
    return every if everything() else [every[0], every[-1]]


def key(stage: int, form: dict[str, Any]) -> str:
    return "-".join([str(stage), *(f"{name}={value}" for name, value in sorted(form.items()))])


def run_compiled_towers(rank: int, world_size: int, data: Path, folder: Path) -> dict[str, Any]:
    """Returns losses, checkpoint names and evaluation features, compiled and eager."""
    world, results = World(rank=rank, world_size=world_size, device=CPU), {}
    for stage, form in [(0, {}), *COMPILED]:
        config = settings(data, stage, world_size, **form)
        engine = Engine(seeded_model(config), config.train, world)
        tokenizer = load_tokenizer(str(config.model.tokenizer), config.data.max_words)
        engine.set_training(False)
        with torch.no_grad():
            batch = next(
                training_batches(config.data, config.model, config.train, tokenizer, world)
            )
            features = engine.encode(*model_inputs(batch, CPU))
        engine.set_training(True)
        values, _ = run_steps(engine, config, world)
        names = [name for name, _ in engine.module.named_parameters()]
        saved = engine.state_dict()["mp_rank_00_model_states.pt"]["module"]
        results[key(stage, form)] = (values, features.words, names, list(saved))
    return results


@pytest.fixture(scope="module")
def results_by_rank(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(run_all_forms, 2, data, tmp_path_factory.mktemp("states"), timeout_s=600)


def assert_same(ours: StepResults, theirs: StepResults) -> None:
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("stage", "form"), principal_and_further(ALL_FORMS, PRINCIPAL), ids=lambda x: str(x)
)
def test_every_form_equals_plain_torch(
    results_by_rank: list[dict[str, Any]], stage: int, form: dict[str, Any]
) -> None:
    for results in results_by_rank:
        assert len(set(results["plain"][0])) == STEPS
        assert_same(results[key(stage, form)], results["plain"])


def test_bf16_forms_equal_each_other(results_by_rank: list[dict[str, Any]]) -> None:
    (stage, form), *others = bf16_forms()
    for results in results_by_rank:
        first = results[key(stage, form)]
        assert first[0] != results["plain"][0]
        assert first[0] == pytest.approx(results["plain"][0], rel=0.1)
        for other in others:
            assert_same(results[key(*other)], first)


def test_a_state_continues_in_another_form(results_by_rank: list[dict[str, Any]]) -> None:
    for results in results_by_rank:
        found = [name for name in results if " -> " in name]
        assert len(found) == len(MOVES)
        for name in found:
            assert_same(results[name], results["beyond " + name.split(" -> ")[0]])


def test_steps_do_not_change_a_staged_copy(results_by_rank: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(results_by_rank):
        found = [name for name in results if name.startswith("copy ")]
        assert len(found) == (11 if everything() else 7)
        for name in found:
            copied, live = results[name]
            assert copied
            # Without ZeRO, rank 0 saves all state.
            assert live == (rank > 0 and name == "copy 0")


def test_compiled_towers_agree_to_rounding_and_keep_parameter_names(
    data: Path, tmp_path: Path
) -> None:
    (results,) = spawn(run_compiled_towers, 1, data, tmp_path, timeout_s=600)
    eager = results[key(0, {})]
    for stage, form in COMPILED:
        values, words, names, saved = results[key(stage, form)]
        # A different rounding somewhere proves that the towers are compiled.
        assert not torch.equal(words, eager[1])
        torch.testing.assert_close(words, eager[1], rtol=0, atol=1e-5)
        assert values == pytest.approx(eager[0], rel=1e-4)
        assert names == eager[2]
        assert saved == eager[3]


def run_compiled(rank: int, world_size: int, folder: Path) -> str:
    """Compiles a function, or loads it from the cache folder; returns the error message."""
    os.environ[COMPILE_CACHE_VARIABLE] = str(folder)
    compiled = torch.compile(lambda x: x.sin() + 1, fullgraph=True)
    try:
        with explain_compile_cache_errors(
            TrainConfig(steps=1, global_batch=1, micro_batch=1, compile=True)
        ):
            compiled(torch.arange(100.0))
    except TrainingFailed as error:
        return str(error)
    return ""


def test_a_broken_compile_cache_is_reported_with_its_folder(tmp_path: Path) -> None:
    assert spawn(run_compiled, 1, tmp_path) == [""]
    files = list(tmp_path.glob("*/*.main.so"))
    for file in files:
        file.write_bytes(b"")
    (message,) = spawn(run_compiled, 1, tmp_path)
    assert any(f"{file}: file too short" in message for file in files)
    assert message.endswith(f"remove {tmp_path}")
