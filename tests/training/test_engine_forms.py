"""Where state lies and what is computed twice changes nothing: every ZeRO stage, offloaded or with
activation checkpointing, takes the very steps of torch's AdamW; compiled, the same to rounding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from builders.carried import CPU, losses, model_of, save_state
from builders.spawn import spawn
from builders.tiny import tiny_config, with_ranks
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tvr.trainer.config import Config, TrainConfig
from tvr.trainer.data import training_batches
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.engine import COMPILE_CACHE_VARIABLE, Engine, explain_compile_cache_errors
from tvr.trainer.errors import TrainingFailed
from tvr.trainer.model.model import model_inputs
from tvr.trainer.model.parameter_groups import parameter_groups
from tvr.trainer.model.tokenizer import load_tokenizer

STEPS, MORE = 2, 1
RECOMPUTED = {"activation_checkpointing": True}
OPTIMIZER = {"offload": "optimizer"}
PARAMETERS = {"offload": "parameters"}
FORMS = [
    *((stage, {}) for stage in (0, 1, 2, 3)),
    *((stage, RECOMPUTED) for stage in (0, 1, 2, 3)),
    *((stage, OPTIMIZER) for stage in (1, 2, 3)),
    (3, PARAMETERS),
]
MOVES = [
    (1, {}, OPTIMIZER),
    (1, OPTIMIZER, {}),
    (2, {}, OPTIMIZER),
    (2, OPTIMIZER, {}),
    (3, {}, PARAMETERS),
    (3, OPTIMIZER, {}),
    (3, PARAMETERS, PARAMETERS),
]
COMPILED = [(0, {"compile": True}), (1, {"compile": True} | OPTIMIZER | RECOMPUTED)]
Taken = tuple[list[float], dict[str, Tensor]]


def settings(data: Path, stage: int, world_size: int, **form: Any) -> Config:
    # Without clipping, whose norm is summed in another order at each stage.
    changes = {"zero_stage": stage, "learning_rate": 3e-3, "weight_decay": 0.5, "gradient_clip": 0}
    config = tiny_config(data, model={"towers": {"layers": 2}}, train=changes | form)
    return with_ranks(config, world_size)


def weights(engine: Any, zero_stage: int) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param if zero_stage else Tensor.detach
    return {name: whole(p).clone() for name, p in engine.module.named_parameters()}


class PlainEngine:
    """The engine's verbs by torch alone: gradients averaged over ranks, then torch's AdamW."""

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
            if parameter.grad is None:  # the frame-weight predictor's, which decays all the same
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self._world.world_size
        self._optimizer.step()
        self._optimizer.zero_grad()


def take(engine: Any, config: Config, world: World, first: int = 0, count: int = STEPS) -> Taken:
    values = losses(engine, config, world, first, count)
    return values, weights(engine, config.train.zero_stage)


def take_all(rank: int, world_size: int, data: Path, folder: Path) -> dict[str, Any]:
    """What each form did, by stage and settings; plain torch's under "plain"."""
    world, results = World(rank=rank, world_size=world_size, device=CPU), {}
    config = settings(data, 0, world_size)
    results["plain"] = take(PlainEngine(model_of(config), config, world), config, world)
    for stage, form in [*FORMS, *half_forms()]:
        config = settings(data, stage, world_size, **form)
        engine = Engine(model_of(config), config.train, world)
        results[key(stage, form)] = take(engine, config, world)
        if form in (OPTIMIZER, PARAMETERS, {}):
            save_state(engine, folder / key(stage, form), world)
            kept = tensors(engine.state_dict())
            live = tensors(engine.state_dict(copy=False))
            then = [tensor.clone() for tensor in live]
            results[f"beyond {key(stage, form)}"] = take(engine, config, world, STEPS, MORE)
            results[f"copy {key(stage, form)}"] = [equal(kept, then), equal(live, then)]
    results |= moved(data, folder, world)
    return results


def moved(data: Path, folder: Path, world: World) -> dict[str, Taken]:
    """Saved in one form and loaded in another, of the same stage."""
    results = {}
    for stage, was, form in MOVES:
        config = settings(data, stage, world.world_size, **form)
        engine = Engine(model_of(config), config.train, world)
        engine.load_checkpoint(folder / key(stage, was) / "shards")
        results[f"{key(stage, was)} -> {form}"] = take(engine, config, world, STEPS, MORE)
    return results


def tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def half_forms() -> list[tuple[int, dict[str, Any]]]:
    forms = [(1, {}), (2, RECOMPUTED), (2, OPTIMIZER), (3, {}), (3, PARAMETERS | RECOMPUTED)]
    return [(stage, {"precision": "bf16"} | form) for stage, form in forms]


def key(stage: int, form: dict[str, Any]) -> str:
    return "-".join([str(stage), *(f"{name}={value}" for name, value in sorted(form.items()))])


def take_compiled(rank: int, world_size: int, data: Path, folder: Path) -> dict[str, Any]:
    """Steps, names in the checkpoint, and features in evaluation, compiled and not."""
    world, results = World(rank=rank, world_size=world_size, device=CPU), {}
    for stage, form in [(0, {}), *COMPILED]:
        config = settings(data, stage, world_size, **form)
        engine = Engine(model_of(config), config.train, world)
        tokenizer = load_tokenizer(str(config.model.tokenizer), config.data.max_words)
        engine.set_training(False)
        with torch.no_grad():
            batch = next(training_batches(config, tokenizer, world))
            features = engine.encode(*model_inputs(batch, CPU))
        engine.set_training(True)
        values, _ = take(engine, config, world)
        names = [name for name, _ in engine.module.named_parameters()]
        saved = engine.state_dict()["mp_rank_00_model_states.pt"]["module"]
        results[key(stage, form)] = (values, features.words, names, list(saved))
    return results


@pytest.fixture(scope="module")
def taken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(take_all, 2, data, tmp_path_factory.mktemp("states"), timeout_s=600)


def assert_same(ours: Taken, theirs: Taken) -> None:
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(("stage", "form"), FORMS, ids=lambda x: str(x))
def test_every_form_takes_the_steps_of_plain_torch(
    taken: list[dict[str, Any]], stage: int, form: dict[str, Any]
) -> None:
    for results in taken:
        assert len(set(results["plain"][0])) == STEPS
        assert_same(results[key(stage, form)], results["plain"])


def test_in_bf16_every_form_takes_the_same_steps(taken: list[dict[str, Any]]) -> None:
    (stage, form), *others = half_forms()
    for results in taken:
        first = results[key(stage, form)]
        assert first[0] != results["plain"][0]
        assert first[0] == pytest.approx(results["plain"][0], rel=0.1)
        for other in others:
            assert_same(results[key(*other)], first)


def test_a_state_goes_on_wherever_it_lay_before(taken: list[dict[str, Any]]) -> None:
    for results in taken:
        found = [name for name in results if " -> " in name]
        assert len(found) == len(MOVES)
        for name in found:
            assert_same(results[name], results["beyond " + name.split(" -> ")[0]])


def test_steps_do_not_reach_what_was_staged(taken: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(taken):
        found = [name for name in results if name.startswith("copy ")]
        assert len(found) == 8
        for name in found:
            kept, live = results[name]
            assert kept
            # Without ZeRO all state is rank 0's to save.
            assert live == (rank > 0 and name == "copy 0")


def test_compiled_towers_give_the_same_to_rounding_under_the_same_names(
    data: Path, tmp_path: Path
) -> None:
    (results,) = spawn(take_compiled, 1, data, tmp_path, timeout_s=600)
    eager = results[key(0, {})]
    for stage, form in COMPILED:
        values, words, names, saved = results[key(stage, form)]
        # Compiled indeed: rounding differs somewhere.
        assert not torch.equal(words, eager[1])
        torch.testing.assert_close(words, eager[1], rtol=0, atol=1e-5)
        assert values == pytest.approx(eager[0], rel=1e-4)
        assert names == eager[2]
        assert saved == eager[3]


def run_compiled(rank: int, world_size: int, folder: Path) -> str:
    """What is said of a small function that torch compiles, or finds compiled in the folder."""
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


def test_half_a_file_that_torch_compiled_is_named_with_the_folder_to_remove(tmp_path: Path) -> None:
    assert spawn(run_compiled, 1, tmp_path) == [""]
    files = list(tmp_path.glob("*/*.main.so"))
    for file in files:
        file.write_bytes(b"")
    (said,) = spawn(run_compiled, 1, tmp_path)
    assert any(f"{file}: file too short" in said for file in files)
    assert said.endswith(f"remove {tmp_path}")
