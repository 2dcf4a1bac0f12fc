"""A step with gradient cache and streamed loss equals the step of the whole batch, at every ZeRO
stage and in a run."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stderr
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.exhaustive import everything, principal_and_further
from builders.gradients import assert_equal_gradients
from builders.plain_model import Gradients
from builders.spawn import spawn
from builders.tiny import tiny_config

from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import Config, to_json
from tvr.trainer.data import training_batches
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.engine import Engine
from tvr.trainer.fencing import begin_attempt
from tvr.trainer.model.model import build_model
from tvr.trainer.model.tokenizer import load_tokenizer
from tvr.trainer.monitoring.run_log import LogWriter
from tvr.trainer.monitoring.step_record import log_event
from tvr.trainer.train_step import TrainStep

CPU = torch.device("cpu")
# Two ranks share the 12 pairs of a step: pairs per forward of a rank, and options of the loss.
WHOLE = {"micro_batch": 6}
CACHED = {"micro_batch": 2, "gradient_cache": True}
STREAMED = CACHED | {"exchange": "ring", "scores": "stream"}
ACCUMULATED = {"micro_batch": 2}
VARIANTS = {"whole": WHOLE, "cached": CACHED, "streamed": STREAMED, "accumulated": ACCUMULATED}
ZERO_STAGES, PRINCIPAL = (0, 1, 2, 3), (1, 3)
STAGES_HERE = ZERO_STAGES if everything() else PRINCIPAL
RecordedSteps = tuple[list[dict[str, Any]], Gradients]


class RecordingEngine(Engine):
    """Records the full gradient of every parameter before the first update of the weights."""

    gradients: Gradients | None = None

    def step(self, learning_rate_factor: float) -> None:
        from deepspeed.utils import safe_get_full_grad

        if self.gradients is None and self._engine.is_gradient_accumulation_boundary():
            self.gradients = {
                name: safe_get_full_grad(parameter).clone()
                for name, parameter in self.module.named_parameters()
            }
        super().step(learning_rate_factor)


def record_steps(
    rank: int, world_size: int, data: Path, run_dir: Path
) -> dict[tuple[int, str], RecordedSteps]:
    """Log events of two steps and gradients of the first, by ZeRO stage and variant."""
    world = World(rank=rank, world_size=world_size, device=CPU)
    results = {}
    for stage in STAGES_HERE:
        for name, settings in VARIANTS.items():
            config = tiny_config(
                data,
                # Large enough for ZeRO-3 to release parameters between their uses.
                model={"towers": {"width": 192 if stage == 3 else 32}},
                train={"zero_stage": stage, "global_batch": 12, "steps": 2, **settings},
            )
            tokenizer = load_tokenizer(str(config.model.tokenizer), config.data.max_words)
            torch.manual_seed(3)
            frames = config.data.num_frames
            model = build_model(config.model, config.loss, tokenizer, num_frames=frames)
            engine = RecordingEngine(model, config.train, world)
            attempt = world.run_on_first(lambda: begin_attempt(run_dir))
            log = LogWriter(run_dir, attempt, world)
            step = TrainStep(config, engine, log, world, {"": 48})
            batches = training_batches(config.data, config.model, config.train, tokenizer, world)
            records = [log_event(step(number, batches)) for number in (1, 2)]
            assert engine.gradients is not None
            results[stage, name] = (records, engine.gradients)
    return results


@pytest.fixture(scope="module")
def recorded(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[tuple[int, str], RecordedSteps]]:
    return spawn(record_steps, 2, data, tmp_path_factory.mktemp("run"), timeout_s=600)


@pytest.mark.parametrize("stage", principal_and_further(ZERO_STAGES, PRINCIPAL))
@pytest.mark.parametrize("name", ["cached", "streamed"])
def test_a_cached_step_equals_the_whole_step_at_every_zero_stage(
    recorded: list[dict[tuple[int, str], RecordedSteps]], stage: int, name: str
) -> None:
    for results in recorded:
        (whole, theirs), (records, ours) = results[stage, "whole"], results[stage, name]
        assert_same_records(records, whole, relative=1e-5)
        assert_equal_gradients(ours, theirs, relative=1e-5)


def assert_same_records(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], *, relative: float
) -> None:
    """Asserts equal values, except for durations and goodput."""
    assert len(ours) == len(theirs) > 0
    for record, expected in zip(ours, theirs, strict=True):
        assert record.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, float) and not name.endswith("_s") and name != "goodput":
                # Cosines near 0 are exact to float32's rounding only.
                assert record[name] == pytest.approx(value, rel=relative, abs=2e-6), name
            elif value is None:
                assert record[name] is None, name
        assert 0 < record["data_wait_s"] < record["step_s"]


def test_accumulation_differs_from_the_whole_step(
    recorded: list[dict[tuple[int, str], RecordedSteps]],
) -> None:
    # A third of the negatives gives a smaller loss, so the comparison above is not vacuous.
    for stage in STAGES_HERE:
        (whole, *_), (parts, *_) = (
            recorded[0][stage, name][0] for name in ("whole", "accumulated")
        )
        assert parts["loss"] < 0.95 * whole["loss"]


def train(config: Config, run_dir: Path, *flags: str) -> list[dict[str, Any]]:
    """Runs `tvr train` in this process, and returns its step events."""
    settings = run_dir.with_suffix(".json")
    settings.write_text(to_json(config))
    with redirect_stderr(io.StringIO()) as stderr:
        code = tvr_train(["--config", str(settings), "--run-dir", str(run_dir), *flags])
    assert code == 0, stderr.getvalue()
    events = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "step"]


def keys(run_dir: Path) -> list[list[str]]:
    lines = (run_dir / "keys" / "rank-00000.jsonl").read_text().splitlines()
    return [json.loads(line)["keys"] for line in lines]


def test_a_run_with_cache_ring_and_stream_equals_the_default_run(
    data: Path, tmp_path: Path
) -> None:
    config = tiny_config(data, train={"log_keys": True})
    default = train(config, tmp_path / "default")
    flags = ["--train.exchange", "ring", "--train.scores", "stream", "--train.gradient-cache"]
    ours = train(config, tmp_path / "streamed", *flags, "--train.micro-batch", "2")
    assert_same_records(ours, default, relative=1e-4)
    # The same samples, two at a time.
    assert [len(found) for found in keys(tmp_path / "streamed")] == [2] * 16
    assert list(chain(*keys(tmp_path / "streamed"))) == list(chain(*keys(tmp_path / "default")))
    evaluations = [
        json.loads((tmp_path / name / "evaluation.json").read_text())
        for name in ("default", "streamed")
    ]
    assert [x["captions"] for x in evaluations] == [10, 10]
