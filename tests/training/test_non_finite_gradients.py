"""A gradient that is not finite changes nothing, is not saved, and ends the run with exit code 3.

The rule is the same at every ZeRO stage. Hooks inject the numbers on rank 1 of two.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders.exhaustive import everything, principal_and_further
from builders.spawn import spawn
from builders.tiny import tiny_config
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tvr.data_prep.records import Batch
from tvr.trainer import loop
from tvr.trainer.build_run import TrainingRun
from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import Config, to_json
from tvr.trainer.monitoring.step_record import StepRecord

BAD_STEP, BAD_RANK, RANKS = 2, 1, 2
PARAMETER = "image_tower"
NAN, INF = math.nan, math.inf
# Name: the number, and the settings of `train`. Two ranks share the 8 pairs of a step.
CASES: dict[str, tuple[float, dict[str, Any]]] = {
    **{f"{x} at stage {n}": (x, {"zero_stage": n}) for n in (0, 1, 2, 3) for x in (NAN, INF)},
    "accumulated at stage 0": (NAN, {"zero_stage": 0, "micro_batch": 2}),
    "accumulated at stage 2": (NAN, {"zero_stage": 2, "micro_batch": 2}),
    "cached at stage 1": (NAN, {"zero_stage": 1, "micro_batch": 2, "gradient_cache": True}),
    "offloaded at stage 1": (INF, {"zero_stage": 1, "offload": "optimizer"}),
    "offloaded at stage 2": (NAN, {"zero_stage": 2, "offload": "optimizer", "micro_batch": 2}),
    "offloaded at stage 3": (NAN, {"zero_stage": 3, "offload": "parameters"}),
    "bf16 at stage 1": (INF, {"zero_stage": 1, "precision": "bf16"}),
    "bf16 at stage 2": (NAN, {"zero_stage": 2, "precision": "bf16", "micro_batch": 2}),
    "bf16 at stage 3": (NAN, {"zero_stage": 3, "precision": "bf16"}),
}
# Every stage, and every form at one of them.
PRINCIPAL = [
    *(f"{NAN} at stage 0", f"{INF} at stage 3", "accumulated at stage 2", "cached at stage 1"),
    *("offloaded at stage 1", "bf16 at stage 2"),
]
# The number comes at the features of one pair; the other cases change a parameter's gradient.
AT_A_PAIR = "a pair"


class Poisoned:
    """The optimiser step of a run whose gradient is spoiled at one step, and the states around."""

    def __init__(self, run: TrainingRun, value: float, at_a_pair: bool) -> None:
        self._step, self._run, self._value = run.train_step, run, value
        self.on, self.before, self.keys = False, [], []
        parameters = dict(run.engine.module.named_parameters())
        self.name = next(name for name in parameters if name.startswith(PARAMETER))
        if run.world.rank != BAD_RANK:
            return
        if at_a_pair:
            self._encode: Callable[..., Any] = run.engine.encode
            run.engine.encode = self._encode_spoiled
        else:
            parameters[self.name].register_hook(self._spoil)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def __call__(self, step: int, batches: Iterator[Batch]) -> StepRecord:
        self.on = step == BAD_STEP
        if self.on:
            self.before = self.state()
        return self._step(step, self._noted(batches))

    def state(self) -> list[Tensor]:
        """Copies of the rank's weights, and of all tensors of its part of a checkpoint.

        The part holds moments and step counters. At stage 0 only rank 0 has one.
        """
        saved = tree_leaves(self._run.engine.state_dict(copy=False))
        weights = self._run.engine.module.parameters()
        return [x.detach().clone() for x in (*weights, *saved) if isinstance(x, Tensor)]

    def _noted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.on:
                self.keys += batch.keys
            yield batch

    def _spoil(self, gradient: Tensor) -> Tensor:
        if not self.on:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[0] = self._value
        return gradient

    def _encode_spoiled(self, *inputs: Tensor) -> Any:
        features = self._encode(*inputs)
        features.words.register_hook(self._spoil)
        return features


def run_all(rank: int, world_size: int, data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Runs every case with `tvr train`; returns what it left, by name."""
    results = {}
    chosen = CASES if everything() else {name: CASES[name] for name in PRINCIPAL}
    cases = {**chosen, AT_A_PAIR: (NAN, {"zero_stage": 1})}
    for number, (name, (value, settings)) in enumerate(cases.items()):
        config = tiny_config(
            data,
            data={"test": None, "test_exchanged": None},
            train={"steps": 3, "micro_batch": 4, **settings},
            checkpoint={"every": 1, "background": False},
            metrics={"enabled": False},
        )
        run_dir = folder / str(number)
        results[name] = run_case(config, run_dir, value, name == AT_A_PAIR)
    return results


def run_case(config: Config, run_dir: Path, value: float, at_a_pair: bool) -> dict[str, Any]:
    runs: list[Poisoned] = []

    def build_run(*args: Any, **options: Any) -> TrainingRun:
        run = original(*args, **options)
        runs.append(Poisoned(run, value, at_a_pair))
        spoiled: Any = runs[0]
        return replace(run, train_step=spoiled)

    original = loop.build_run
    settings = run_dir.with_suffix(f".{os.environ['RANK']}.json")  # the ranks write it at any time
    settings.write_text(to_json(config))
    with redirect_stderr(io.StringIO()) as stderr, patch.object(loop, "build_run", build_run):
        code = tvr_train(["--config", str(settings), "--run-dir", str(run_dir)])
    (run,) = runs
    after = run.state()
    same = all(torch.equal(x, y) for x, y in zip(run.before, after, strict=True))
    return {
        "code": code,
        "stderr": stderr.getvalue(),
        "unchanged": same and len(after) > 0,
        "finite": all(x.isfinite().all() for x in after if x.is_floating_point()),
        "saved": sorted(path.name for path in (run_dir / "checkpoints").glob("step-*")),
        "keys": run.keys,
        "parameter": run.name,
        "log": [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()],
    }


Results = Sequence[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def results(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return spawn(run_all, RANKS, data, tmp_path_factory.mktemp("runs"), timeout_s=300)


@pytest.mark.parametrize("name", principal_and_further(CASES, PRINCIPAL))
def test_the_update_is_not_applied_and_not_saved(results: Results, name: str) -> None:
    for result in (everyone[name] for everyone in results):
        assert result["code"] == 3
        assert result["unchanged"]
        assert result["finite"]
        assert result["saved"] == ["step-00000001"]


@pytest.mark.parametrize("name", principal_and_further(CASES, PRINCIPAL))
def test_the_error_names_parameter_and_pairs(results: Results, name: str) -> None:
    stderr = "".join(everyone[name]["stderr"] for everyone in results)
    first = results[0][name]
    assert stderr.count(f"step {BAD_STEP}: the loss is finite, but its gradient is not") == 1
    assert f"Parameters: {first['parameter']}." in stderr
    assert "the update was not applied, and the step is not saved" in stderr
    (event,) = [event for event in first["log"] if event["event"] == "non_finite_gradient"]
    assert event["parameters"] == [first["parameter"]]
    for rank, everyone in enumerate(results):
        keys = everyone[name]["keys"]
        assert f"rank {rank}: {' '.join(keys)};" in stderr
        assert event["keys"][str(rank)] == keys


def test_a_single_pair_is_named_alone(results: Results) -> None:
    name = AT_A_PAIR
    stderr = "".join(everyone[name]["stderr"] for everyone in results)
    bad = results[BAD_RANK][name]["keys"][0]
    assert f"at their features: rank {BAD_RANK}: {bad}; log.jsonl" in stderr
    assert all(everyone[name]["unchanged"] for everyone in results)
    assert all(everyone[name]["saved"] == ["step-00000001"] for everyone in results)
